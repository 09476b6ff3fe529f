"""The package's rooms: what may import what, and how large a module or a function may be."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "peft_scalora"
# A room may import itself and the rooms before it, so there is no circle and no arrow that runs up.
ROOMS = (
    "version",
    "_seams",
    "maths",
    "files",
    "held",
    "live",
    "quantized",
    "plots",
    "merged_base",
    "accumulator",
    "config",
    "fused",
    "layer",
    "state",
    "lora_only",
    "rescaling",
    "model",
    "register",
    "rank",
    "export",
    "callbacks",
    "gauss_newton",
    "stability",
    "finetuning",
    "integrations",
    "commands",
    "cli",
    "__main__",
)
MOST_LINES_OF_A_MODULE = 300
MOST_LINES_OF_A_FUNCTION = 50  # without its docstring

MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}

SOURCES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "eval").rglob("*.py"), *(ROOT / "examples").rglob("*.py")])


def room_of(module: str) -> str:
    """Return the part of a dotted name below the package: a folder, or a module at its root."""
    return module.split(".")[1]


def is_for_type_checkers(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imported(module: str, path: Path) -> set[str]:
    """Return the modules of the package that `module` imports anywhere, functions included."""
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    found = set()
    pending = [ast.parse(path.read_text())]
    while pending:
        node = pending.pop()
        if is_for_type_checkers(node):
            continue
        pending += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*above, *filter(None, [node.module])])
            names = {f"{source}.{alias.name}" for alias in node.names}
            found |= (names & MODULES.keys()) or {source}
    return found


@pytest.mark.parametrize("module", sorted(MODULES.keys() - {"peft_scalora"}))
def test_a_room_imports_only_rooms_before_it(module):
    assert room_of(module) in ROOMS, f"{room_of(module)} has no place in ROOMS: say which rooms may import it."
    allowed = ROOMS[: ROOMS.index(room_of(module)) + 1]
    targets = {target for target in imported(module, MODULES[module]) if target.startswith("peft_scalora.")}
    above = {target for target in targets if room_of(target) not in allowed}
    assert not above, f"{module} imports {', '.join(sorted(above))}, which stand above it."


def test_the_modules_of_a_room_import_each_other_in_no_circle():
    arrows = {module: imported(module, path) & MODULES.keys() for module, path in MODULES.items()}
    remaining = dict(arrows)
    while remaining:
        leaves = {module for module, targets in remaining.items() if not (targets - {module}) & remaining.keys()}
        assert leaves, (
            f"These modules import each other in a circle, or import from one: {', '.join(sorted(remaining))}"
        )
        remaining = {module: targets for module, targets in remaining.items() if module not in leaves}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_the_library_imports_no_application(module):
    outside = {"eval", "examples", "tests"}
    assert not {target.split(".")[0] for target in imported(module, MODULES[module])} & outside


def test_the_maths_know_tensors_only():
    for module, path in MODULES.items():
        if module.startswith("peft_scalora.maths"):
            foreign = {target.split(".")[0] for target in imported(module, path)}
            assert foreign <= {"__future__", "collections", "dataclasses", "math", "typing", "torch", "peft_scalora"}


def lines_of(function: ast.FunctionDef) -> int:
    """Return the lines of a function without those of its docstring."""
    first = function.body[0]
    has_docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    documented = first.end_lineno - first.lineno + 1 if has_docstring else 0
    return function.end_lineno - function.lineno + 1 - documented


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_and_functions_can_be_read_at_once(path):
    text = path.read_text()
    assert len(text.splitlines()) <= MOST_LINES_OF_A_MODULE
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert lines_of(node) <= MOST_LINES_OF_A_FUNCTION, node.name
