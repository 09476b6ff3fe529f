"""Options of the LoRA part of a layer, and layers that have no rescaling."""

import copy
import math
import warnings

import pytest
import torch
from helpers_models import (
    KINDS,
    SCALE,
    Convolution,
    Linears,
    dense_weights,
    distance,
    floats,
    oracle,
    output,
    saved_tensors,
    scalora_layers,
    train,
    with_weights,
)
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

# Options of the LoRA part.


def test_dropout_acts_on_the_factors_only():
    """With everything dropped the adapter is U V alone."""
    base, model = KINDS["Linear"].filled(lora_dropout=0.5)
    x = floats(5, 14)
    assert distance(output(model, x), oracle(base, model, x)) < 1e-5
    for layer in scalora_layers(model).values():
        layer.lora_dropout["default"].p = 1.0
    tensors = saved_tensors(model)
    for t in tensors.values():
        t["lora_B"].zero_()
    assert distance(output(model.train(), x), with_weights(base, dense_weights(base, tensors, SCALE), x)) < 1e-5


@pytest.mark.parametrize("scaling", ["column", "scalar", "exact"])
@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal"])
def test_every_scaling_and_initialisation(scaling, init):
    base, model = KINDS["Linear"].filled(scaling=scaling, init_lora_weights=init)
    assert distance(output(model, floats(5, 14)), oracle(base, model, floats(5, 14))) < 1e-5


def test_rslora_folds_at_its_own_scale():
    base, model = KINDS["Linear"].filled(use_rslora=True, r=3)
    x = floats(5, 14)
    assert distance(output(model, x), oracle(base, model, x, scale=3 / math.sqrt(3))) < 1e-5
    for layer in scalora_layers(model).values():
        layer.set_scale("default", 0.5)
    assert distance(output(model, x), oracle(base, model, x, scale=3 / math.sqrt(3), factor=0.5)) < 1e-5


def test_rank_and_alpha_patterns():
    base, model = KINDS["Linear"].filled(rank_pattern={"lin0": 4}, alpha_pattern={"lin1": 8}, accumulator_rank="auto")
    scale = {"lin0": 3 / 4, "lin1": 8 / 2}
    assert distance(output(model, floats(5, 14)), oracle(base, model, floats(5, 14), scale=scale)) < 1e-5
    lin0, lin1 = model.base_model.model.lin0, model.base_model.model.lin1
    assert lin0.scalora_U["default"].shape == (18, 14), "7 r = 28 is more than min(in, out) = 14"
    assert lin1.scalora_U["default"].shape == (10, 10), "7 r = 14 is more than min(in, out) = 10"


def test_lora_bias_stays_outside_the_fold():
    base, model = KINDS["Linear"].filled(lora_bias=True)
    x = floats(5, 14)
    weights = dense_weights(base, saved_tensors(model), SCALE)
    for name, layer in scalora_layers(model.base_model.model).items():
        bias = layer.lora_B["default"].bias.detach().double()
        assert bias.abs().max() > 1e-3
        weights[f"{name}.bias"] = base.get_parameter(f"{name}.bias").detach().double() + SCALE * bias
    expected = with_weights(base, weights, x)
    assert distance(output(model, x), expected) < 1e-5
    assert distance(output(model.merge_and_unload(), x), expected) < 1e-5


# Layers without a rescaling.


def test_grouped_convolution_is_plain_lora_with_a_warning():
    base = Convolution(2, groups=2).eval()
    with pytest.warns(UserWarning, match=r"conv0: rescaling is not defined for Conv2d.*plain LoRA"):
        model = get_peft_model(copy.deepcopy(base), KINDS["Conv2d"].config())
    assert list(scalora_layers(model.base_model.model)) == ["conv1"]
    x = KINDS["Conv2d"].inputs()
    train(model, x, 4)
    plain = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, lora_alpha=3, target_modules=["conv0", "conv1"]))
    with torch.no_grad():
        for name in ("conv0", "conv1"):
            for factor in ("lora_A", "lora_B"):
                source = model.base_model.model.get_submodule(f"{name}.{factor}.default").weight
                plain.base_model.model.get_submodule(f"{name}.{factor}.default").weight.copy_(source)
        conv1 = plain.base_model.model.conv1.base_layer
        tensors = saved_tensors(model)["conv1"]
        conv1.weight += (tensors["scalora_U"] @ tensors["scalora_V"]).float().reshape(conv1.weight.shape)
    assert distance(output(model.eval(), x), output(plain.eval(), x)) < 1e-5


def test_custom_layer_is_plain_lora_with_a_warning():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    class LoraDoubled(nn.Module, LoraLayer):
        def __init__(self, base_layer, adapter_name, config, r, lora_alpha, **kwargs):
            super().__init__()
            LoraLayer.__init__(self, base_layer)
            self._active_adapter = adapter_name
            self.update_layer(adapter_name, r, lora_alpha, config=config)

        def forward(self, x):
            change = self.lora_B["default"](self.lora_A["default"](x)) * self.scaling["default"]
            return self.base_layer(x) + change

    base = Linears()
    base.lin1 = Doubled(18, 10)
    config = KINDS["Linear"].config()
    config._register_custom_module({Doubled: LoraDoubled})
    with pytest.warns(UserWarning, match=r"lin1: rescaling is not defined for .*Doubled.*plain LoRA"):
        model = get_peft_model(base, config)
    assert list(scalora_layers(model.base_model.model)) == ["lin0"]
    train(model, floats(5, 14), 3)
    assert model.base_model.model.lin1.lora_B["default"].weight.abs().max() > 0


def test_supported_layers_do_not_warn():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "(?s).*(rescaling|plain LoRA)")
        for kind in KINDS.values():
            get_peft_model(kind.build(), kind.config())
