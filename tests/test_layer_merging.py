"""Merging, unloading and scaling the whole change of every kind of layer."""

import math

import pytest
import torch
from helpers_models import (
    KINDS,
    SCALE,
    Embeddings,
    dense_weights,
    distance,
    every_accumulator,
    every_layer_kind,
    factor_parameters,
    oracle,
    output,
    saved_tensors,
    scalora_layers,
)
from peft import LoraConfig, get_peft_model
from peft.helpers import rescale_adapter_scale
from peft.tuners.lora import LoraLayer

from peft_scalora import rescale

# Merging.


@every_layer_kind
@every_accumulator
@pytest.mark.parametrize("safe_merge", [False, True])
def test_merge_and_unmerge(kind, accumulator_rank, safe_merge):
    base, model = kind.filled(accumulator_rank=accumulator_rank)
    x = kind.inputs()
    expected = oracle(base, model, x)
    model.merge_adapter(safe_merge=safe_merge)
    assert distance(output(model, x), expected) < 1e-5
    model.unmerge_adapter()
    assert distance(output(model, x), expected) < 1e-5
    with model.disable_adapter():
        assert distance(output(model, x), output(base, x)) < 1e-5


@every_layer_kind
@every_accumulator
def test_merge_and_unload_gives_the_plain_model(kind, accumulator_rank):
    base, model = kind.filled(accumulator_rank=accumulator_rank)
    x = kind.inputs()
    expected = oracle(base, model, x)
    plain = model.merge_and_unload(safe_merge=True)
    assert type(plain) is type(base)
    assert plain.state_dict().keys() == base.state_dict().keys()
    assert not any(isinstance(module, LoraLayer) for module in plain.modules())
    assert distance(output(plain, x), expected) < 1e-5


@every_layer_kind
def test_unload_gives_the_base_model_back(request, kind):
    base, model = kind.filled()
    unloaded = model.unload()
    assert type(unloaded) is type(base)
    attention = "MultiheadAttention" in request.node.callspec.id
    if not hasattr(base, "classifier"):  # modules_to_save stay, as in PEFT
        assert distance(output(unloaded, kind.inputs()), output(base, kind.inputs())) < (1e-5 if attention else 1e-30)


def test_safe_merge_refuses_a_broken_accumulator():
    base, model = KINDS["Linear"].filled()
    layer = model.base_model.model.lin0
    layer.scalora_U["default"][0, 0] = math.nan
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, base.lin0.weight)


def test_merging_into_a_bfloat16_base_rounds_the_sum_once():
    base, model = KINDS["Linear"].filled()
    base, model = base.bfloat16(), model.bfloat16()
    for factors in factor_parameters(model).values():
        for parameter in factors.values():
            parameter.data = parameter.data.float()  # as PEFT keeps adapters on a bfloat16 base
    weights = dense_weights(base, saved_tensors(model), SCALE)
    model.merge_adapter()
    for name, weight in weights.items():
        layer = model.base_model.model.get_submodule(name.removesuffix(".weight"))
        merged = layer.base_layer.weight.double()
        # Half a unit in the last of 8 bits.
        assert ((merged - weight).abs() <= weight.abs() * 2**-8 + 1e-6).all()


# Scales.


@every_layer_kind
@every_accumulator
def test_set_scale_scales_the_whole_change(kind, accumulator_rank):
    base, model = kind.filled(accumulator_rank=accumulator_rank)
    x = kind.inputs()
    for factor in (0.0, 0.3, -1.0, 2.0, 1.0):
        for layer in scalora_layers(model).values():
            layer.set_scale("default", factor)
        with torch.no_grad():
            assert distance(output(model, x), oracle(base, model, x, factor=factor)) < 1e-4, factor
        model.merge_adapter()
        assert distance(output(model, x), oracle(base, model, x, factor=factor)) < 1e-4, factor
        model.unmerge_adapter()


@pytest.mark.parametrize("name", ["Linear", "Conv1D", "Conv2d", "MultiheadAttention", "Llama"])
@every_accumulator
def test_scale_layer_unscale_layer_and_rescale_adapter_scale(name, accumulator_rank):
    options = {"target_modules": ["q_proj", "down_proj"]} if name == "Llama" else {}
    base, model = KINDS[name].filled(accumulator_rank=accumulator_rank, **options)
    x = KINDS[name].inputs()
    layers = scalora_layers(model).values()

    def check(factor):
        assert distance(output(model, x), oracle(base, model, x, factor=factor)) < 1e-4, factor

    for layer in layers:
        layer.scale_layer(0.5)
    check(0.5)
    for layer in layers:
        layer.scale_layer(3)
    check(1.5)
    for layer in layers:
        layer.unscale_layer(2)
    check(0.75)
    with rescale_adapter_scale(model, 0.5):
        check(0.375)
    check(0.75)
    with rescale_adapter_scale(model, 0):
        check(0)
    for layer in layers:
        layer.unscale_layer()
    check(1)


def test_scales_of_plain_embedding_layers_are_plain_pefts():
    """PEFT's scale_layer leaves embeddings alone: the accumulated change must then stay as it is, too."""
    base, model = KINDS["Embedding"].filled()
    x = KINDS["Embedding"].inputs()
    plain = get_peft_model(Embeddings(), LoraConfig(target_modules=["emb"]))
    before = plain.base_model.model.emb.scaling["default"]
    plain.base_model.model.emb.scale_layer(2.0)
    factor = plain.base_model.model.emb.scaling["default"] / before
    model.base_model.model.emb.scale_layer(2.0)
    assert distance(output(model, x), oracle(base, model, x, factor=factor)) < 1e-5


@pytest.mark.parametrize("name", ["Linear", "Embedding", "Conv2d", "MultiheadAttention"])
@pytest.mark.parametrize("factor", [0.4, 3.0])
def test_rescaling_after_set_scale_preserves_the_function(name, factor):
    """A fold is stored at the configured scale, whatever the scale in use."""
    kind = KINDS[name]
    base, model = kind.filled(accumulator_rank=12)
    x = kind.inputs()
    for layer in scalora_layers(model).values():
        layer.set_scale("default", factor)
    model.train()
    before = output(model, x)
    before.square().mean().backward()
    factors = {k: p.detach().clone() for k, p in model.named_parameters() if p.requires_grad}
    report = rescale(model)
    assert report.skipped == 0
    assert any(distance(p, factors[k]) > 0.01 for k, p in model.named_parameters() if p.requires_grad)
    assert distance(output(model, x), before) < 1e-5
    assert distance(output(model.eval(), x), oracle(base, model, x, factor=factor)) < 1e-4
