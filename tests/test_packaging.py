"""What a user of the installed package meets: names that editors see, metadata, lines that install it."""

import ast
import configparser
import importlib
import re
from pathlib import Path

import pytest

import peft_scalora
from peft_scalora.version import SOURCE_URL, install_command

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").rglob("*.md")])


def names_for_type_checkers(path: Path) -> set[str]:
    """Return the names that a module imports, under themselves, for type checkers alone."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            aliases = [alias for line in node.body for alias in line.names]
            assert all(alias.name == alias.asname for alias in aliases)
            found |= {alias.name for alias in aliases}
    return found


@pytest.mark.parametrize("name", ["peft_scalora", "peft_scalora.stability"])
def test_lazily_imported_names_are_known_to_editors_and_type_checkers(name):
    module = importlib.import_module(name)
    lazy = set(module.__all__) - {public for public in module.__all__ if public in vars(module)}
    assert lazy <= names_for_type_checkers(Path(module.__file__)) <= set(module.__all__)
    assert set(module.__all__) <= set(dir(module))
    for public in module.__all__:
        assert getattr(module, public) is not None


def test_the_package_is_typed():
    assert (Path(peft_scalora.__file__).parent / "py.typed").exists()
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert setup["options.package_data"]["peft_scalora"] == "py.typed"


def test_the_source_is_named_alike_everywhere():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert setup["metadata"]["url"] == SOURCE_URL
    assert install_command("plots") == f"pip install 'peft-scalora[plots] @ git+{SOURCE_URL}'"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_documents_install_from_the_source(document):
    """The package is on no index: a line that only names it would find nothing."""
    for line in re.findall(r"pip install[^`\n]*", document.read_text()):
        extras = re.search(r"peft-scalora\[([^\]]*)\]", line)
        expected = install_command(extras[1] if extras else "")
        assert "peft-scalora" not in line or line.strip() == expected


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files_of_the_repository(document):
    """README is also the description on an index, where relative links are broken."""
    raw = SOURCE_URL.replace("github.com", "raw.githubusercontent.com") + "/main/"
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", document.read_text()):
        inside = target.removeprefix(f"{SOURCE_URL}/blob/main/").removeprefix(f"{SOURCE_URL}/tree/main/")
        inside = inside.removeprefix(raw)
        if inside != target:
            assert (ROOT / inside).exists(), target
        elif "://" not in target:
            assert document.name != "README.md" or document.parent != ROOT, f"{target} is relative"
            assert (document.parent / target).exists(), target
