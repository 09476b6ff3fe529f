"""Check what the documentation answers to PEFT's question: which layers a method can adapt.

Several adapters, merging, mixed batches, weighted sums, hotswap and conversion have tests of what they compute:
test_model_adapters, test_model_combining, test_layer_scale and test_lora_only.
"""

import re
from pathlib import Path

import pytest
from peft import get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_scalora import ScaLoRAConfig

PAGE = Path(__file__).parents[1] / "docs" / "integrations.md"
LAYERS = {
    "Linear": lambda: nn.Linear(16, 16),
    "Embedding": lambda: nn.Embedding(8, 16),
    "Conv1d": lambda: nn.Conv1d(16, 16, 3),
    "Conv2d": lambda: nn.Conv2d(16, 16, 3),
    "Conv3d": lambda: nn.Conv3d(16, 16, 3),
    "MultiheadAttention": lambda: nn.MultiheadAttention(16, 2),
    "Conv1D (transformers)": lambda: Conv1D(16, 16),
    "LayerNorm": lambda: nn.LayerNorm(16),
}


def row(name):
    yes, no = re.search(rf"^\| {name} \| (.+) \| (.+) \|$", PAGE.read_text(), re.MULTILINE).groups()
    return yes.split(", "), no.split(", ")


def can_be_target(make):
    model = nn.Sequential()
    model.layer = make()
    try:
        get_peft_model(model, ScaLoRAConfig(target_modules=["layer"]))
    except ValueError:
        return False
    return True


def test_layers_that_can_be_targets():
    found = {name: can_be_target(make) for name, make in LAYERS.items()}
    yes, no = row("layers that can be targets")
    assert found == dict.fromkeys(yes, True) | dict.fromkeys(no, False)


def test_a_mixed_model_is_refused():
    model = nn.Sequential()
    model.layer = nn.Linear(16, 16)
    with pytest.raises(ValueError, match=r"SCALORA.*PeftMixedModel"):
        get_peft_model(model, ScaLoRAConfig(target_modules=["layer"]), mixed=True)
