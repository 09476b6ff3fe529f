"""Parts of other libraries that the package relies on: each is there, does what is relied on, and is listed."""

import ast
import configparser
import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from peft_scalora._seams import READ_IN, SEAMS, SeamError, check, find

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "peft_scalora"
MODULES = [path for path in PACKAGE.rglob("*.py") if path.name != "_seams.py"]


CHECK_ALL = """
import json, sys
from importlib.util import find_spec
from peft_scalora._seams import SEAMS, SeamError, check
faults = {}
for number, seam in enumerate(SEAMS):
    if find_spec(seam.library):
        try:
            check(seam)
        except SeamError as error:
            faults[number] = str(error)
with open(sys.argv[1], "w") as file:
    json.dump(faults, file)
"""


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    """What is wrong with each row, in a process of its own: libraries that other tests used have patched torch."""
    path = tmp_path_factory.mktemp("seams") / "faults.json"
    subprocess.run([sys.executable, "-c", CHECK_ALL, str(path)], check=True, cwd=ROOT)
    return json.loads(path.read_text())


@pytest.mark.parametrize(
    "number", range(len(SEAMS)), ids=[f"{seam.name} {' '.join(seam.source)}".strip() for seam in SEAMS]
)
def test_every_part_is_there_and_does_what_is_relied_on(number, faults):
    pytest.importorskip(SEAMS[number].library)
    assert str(number) not in faults, faults[str(number)]


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def is_super(value: ast.expr) -> bool:
    return isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == "super"


def names_of(path: Path) -> tuple[set[str], set[str], set[str]]:
    """Return the private names that a module uses, defines itself, and overrides (calls on super())."""
    used, own, overridden = set(), set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            own.add(node.name)
        if isinstance(node, ast.Attribute):
            (own if isinstance(node.ctx, ast.Store) else used).add(node.attr)
            if is_super(node.value):
                overridden.add(node.attr)
        if isinstance(node, ast.ImportFrom) and not node.level:
            used |= {alias.name for alias in node.names} | set(node.module.split("."))
    return tuple(set(filter(is_private, names)) for names in (used, own, overridden))


def test_every_private_name_of_others_is_listed():
    used, own, overridden = (set().union(*names) for names in zip(*map(names_of, MODULES)))
    listed = {name for seam in SEAMS for name in re.findall(r"\w+", f"{seam.name} {' '.join(seam.source)}")}
    missing = (used - own | overridden) - listed - {"_getframe"}  # of the standard library
    assert not missing, f"{sorted(missing)} of other libraries are in no row of peft_scalora/_seams.py"


# Each removes a part in the way that a release would, and names what has to stop the import or the check.
BREAKS = {
    "a renamed hook": (
        "del peft.tuners.lora.model.LoraModel._remap_adapter_state_dict_for_load\n"
        "del peft.tuners.tuners_utils.BaseTuner._remap_adapter_state_dict_for_load",
        "peft.tuners.lora.model:LoraModel._remap_adapter_state_dict_for_load",
    ),
    "a removed constant": (
        "del peft.tuners.lora.layer.VARIANT_KWARG_KEYS",
        "peft.tuners.lora.layer:VARIANT_KWARG_KEYS",
    ),
    "a removed function": (
        "del peft.utils.save_and_load._validate_lora_adapter_state_dict",
        "peft.utils.save_and_load:_validate_lora_adapter_state_dict",
    ),
}


@pytest.mark.parametrize("broken, name", BREAKS.values(), ids=BREAKS)
def test_an_import_without_a_part_names_library_part_and_remedy(broken, name):
    script = f"import peft, peft.tuners.lora.layer, peft.utils.save_and_load\n{broken}\nimport peft_scalora"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode, "imported as if nothing were missing"
    message = done.stderr.strip().splitlines()[-1]
    for part in ("SeamError", name, f"peft {version('peft')}", f"peft=={READ_IN['peft']}", "newer peft-scalora"):
        assert part in message


def test_a_hook_that_is_not_called_any_more_is_found(monkeypatch):
    import peft.utils.save_and_load as saving

    def get_peft_model_state_dict(model):
        return model.state_dict()

    monkeypatch.setattr(saving, "get_peft_model_state_dict", get_peft_model_state_dict)
    broken = [seam for seam in SEAMS if seam.name.endswith(":get_peft_model_state_dict")]
    for seam in broken:
        with pytest.raises(SeamError, match=r"_get_adapter_state_dict\('? is not at its place.*peft=="):
            check(seam)
    assert broken


def test_a_forward_pass_that_has_changed_is_found(monkeypatch):
    import peft.tuners.lora.layer as lora_layer

    def forward(self, x, *args, **kwargs):
        return self.base_layer(x, *args, **kwargs) + self.new_term(x)

    monkeypatch.setattr(lora_layer.Linear, "forward", forward)
    (seam,) = (seam for seam in SEAMS if seam.digest)
    with pytest.raises(SeamError, match=r"changed a part \(digest [0-9a-f]+\): peft.tuners.lora.layer:Linear.forward"):
        check(seam)


def test_tensor_parallelism_is_no_reason_to_stop_the_import():
    """PEFT's private helper for it is not in every release."""
    script = "import peft.tuners.lora.model as m\ndel m.get_tp_plan_and_mesh\nimport peft_scalora"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


def test_releases_that_were_read_are_within_the_bounds():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lines = "\n".join([setup["options"]["install_requires"], *setup["options.extras_require"].values()]).splitlines()
    lines = [line for line in lines if line.strip() and not line.startswith(("%", "#"))]
    bounds = {}
    for requirement in map(Requirement, lines):
        bounds.setdefault(requirement.name, requirement.specifier)
    for library in ("peft", "torch", "transformers"):
        assert bounds[library].contains(READ_IN[library])
        assert "<" in str(bounds[library]), f"{library} has no upper bound"
    assert set(READ_IN) >= {seam.library for seam in SEAMS}
    assert all(find(seam) is not None for seam in SEAMS if seam.library in ("peft", "torch"))
