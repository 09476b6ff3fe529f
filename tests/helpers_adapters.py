"""Models with trained adapters, saved and loaded, for the tests of whole adapters (test_model_*.py)."""

import copy
import subprocess
import sys
import textwrap
import warnings

import pytest
from helpers_models import KINDS, fill
from peft import get_peft_model

every_kind = pytest.mark.parametrize("name", KINDS)
WEIGHTS = [0.7, -0.4]


def two_adapters(name="Linear", other=None, **options):
    """A model with filled adapters "default" and "other", "default" active; `other` are options of the second."""
    kind = KINDS[name]
    base, model = kind.filled(**options)
    model.add_adapter("other", kind.config(**options | (other or {})))
    fill(model, "other", kind.inputs(), seed=7)
    assert model.active_adapters == ["default"]
    return base, model, kind.inputs()


def state_of(model, adapter):
    return {k: v.clone() for k, v in model.state_dict().items() if f".{adapter}" in k and "lora_" in k}


def saved_pair(tmp_path, name="Linear", **options):
    kind = KINDS[name]
    base, first = kind.filled(**options)
    second = get_peft_model(copy.deepcopy(base), kind.config(**options))
    fill(second, inputs=kind.inputs(), steps=9, seed=8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first.save_pretrained(tmp_path / "first")
        second.save_pretrained(tmp_path / "second")
    return base, first, second, kind.inputs()


def save(model, folder, **kwargs):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*save_embedding_layers.*")
        model.save_pretrained(folder, **kwargs)


def run_python(script, check=True):
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False
    )
    assert not check or result.returncode == 0, result.stderr
    return result
