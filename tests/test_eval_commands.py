"""Commands of the evaluation as the documentation writes them: their modules are there, and know their options."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TAKES_LM_EVALS_OPTIONS = "eval.lm_eval.scalora"


def commands(text: str) -> list[list[str]]:
    """Return the words of every line that runs `python -m eval...`, variables filled in."""
    found = []
    variables = {}
    for line in text.replace("\\\n", " ").splitlines():
        for name, value in variables.items():
            line = line.replace(f"${name}", value)
        assignment = re.fullmatch(r'([A-Z])="(.*)"', line)
        if assignment:
            variables[assignment[1]] = assignment[2]
        elif match := re.search(r"python -m (eval\.[^`|]*)", line):
            found.append(shlex.split(match[1]))
    return found


def documented() -> list[list[str]]:
    paths = [ROOT / "README.md", ROOT / "Makefile", *sorted((ROOT / "docs").glob("*.md"))]
    return [command for path in paths for command in commands(path.read_text())]


def options_of(module: str, monkeypatch, capsys) -> set[str]:
    monkeypatch.setattr("sys.argv", [module, "--help"])
    with pytest.raises(SystemExit):
        importlib.import_module(module).main()
    return set(re.findall(r"--[\w-]+", capsys.readouterr().out))


def test_the_documentation_has_commands():
    assert len(documented()) > 20


@pytest.mark.parametrize("module", sorted({command[0].rstrip(".,)") for command in documented()}))
def test_documented_commands_have_options_that_their_modules_know(module, monkeypatch, capsys):
    if module == TAKES_LM_EVALS_OPTIONS:
        importlib.import_module(module)
        return
    known = options_of(module, monkeypatch, capsys)
    for name, *words in documented():
        words, rest = (words[: words.index("--")], words[words.index("--") :]) if "--" in words else (words, [])
        if name == module:
            assert {word.rstrip(".,)") for word in words if word.startswith("--")} <= known
        if rest and words[words.index("--module") + 1] == module:
            assert {word for word in rest if word.startswith("--") and word != "--"} <= known
