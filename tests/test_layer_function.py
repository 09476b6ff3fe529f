"""The function of every kind of layer, with a filled accumulator, against the dense weight W + s B A + U V."""

import copy

import pytest
import torch
from helpers_models import (
    KINDS,
    SCALE,
    VOCABULARY,
    Embeddings,
    as_stored,
    change_of,
    check_filled,
    dense_weights,
    distance,
    double,
    every_accumulator,
    every_layer_kind,
    factor_parameters,
    fill,
    oracle,
    output,
    saved_tensors,
    scalora_layers,
    tokens,
    train,
    with_weights,
)
from peft import get_peft_model

# Attention merges and unmerges its float32 base weights at every call, which rounds them.
DOUBLE = {"MultiheadAttention": 1e-6}


# The function.


@every_layer_kind
@every_accumulator
def test_forward_is_that_of_the_dense_weight(kind, accumulator_rank):
    base, model = kind.filled(accumulator_rank=accumulator_rank)
    x = kind.inputs()
    expected = oracle(base, model, x)
    assert distance(output(model, x), expected) < 1e-5
    without = {name: {k: v for k, v in t.items() if "scalora" not in k} for name, t in saved_tensors(model).items()}
    assert distance(with_weights(base, dense_weights(base, without, SCALE), x), expected) > 0.03


@every_layer_kind
@every_accumulator
def test_forward_and_gradients_in_float64(request, kind, accumulator_rank):
    """lora_A, lora_B and the input get the gradients that autograd gives the explicit model."""
    base, model = kind.filled(accumulator_rank=accumulator_rank)
    tolerance = DOUBLE.get(request.node.callspec.id.split("-")[-1], 1e-12)
    model = model.double()
    x, dense_x = double(kind.inputs()), double(kind.inputs())
    differentiable = x.is_floating_point()
    result = output(model, x.requires_grad_(differentiable))
    direction = torch.randn_like(result)
    (result * direction).sum().backward()

    layers = saved_tensors(model)
    for tensors in layers.values():
        for name, tensor in tensors.items():
            tensor.requires_grad_(name.startswith("lora_"))
    weights = dense_weights(base, layers, SCALE)
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "modules_to_save") and "default" in module.modules_to_save:
            weights |= {f"{name}.{k}": p.detach() for k, p in module.modules_to_save["default"].named_parameters()}
    expected = with_weights(base, weights, dense_x.requires_grad_(differentiable))
    (expected * direction).sum().backward()

    assert distance(result, expected) < tolerance
    checked = factor_parameters(model)
    assert checked.keys() == layers.keys()
    for layer, parameters in checked.items():
        for name, parameter in parameters.items():
            assert parameter.grad.abs().max() > 0
            assert distance(parameter.grad, layers[layer][name].grad) < tolerance, (layer, name)
    if differentiable:
        assert distance(x.grad, dense_x.grad) < tolerance


@every_layer_kind
def test_training_moves_the_function_past_rank_r(kind):
    _, model = kind.filled(accumulator_rank=64)
    for layer, tensors in saved_tensors(model).items():
        change = change_of(tensors, SCALE)
        assert torch.linalg.matrix_rank(change, rtol=1e-5) > min(2, min(change.shape) - 1), layer


@every_layer_kind
@every_accumulator
def test_disabled_adapter_is_the_base_model(request, kind, accumulator_rank):
    base, model = kind.filled(accumulator_rank=accumulator_rank)
    x = kind.inputs()
    with model.disable_adapter():
        disabled = output(model, x)
    attention = "MultiheadAttention" in request.node.callspec.id
    assert distance(disabled, output(base, x)) < (1e-5 if attention else 1e-30)
    assert distance(output(model, x), output(base, x)) > 0.05


@every_layer_kind
def test_training_leaves_the_base_weights_bit_identical(request, kind):
    base, model = kind.filled()
    now = {
        name.replace(".base_layer", "").replace(".original_module", ""): tensor
        for name, tensor in model.get_base_model().state_dict().items()
        if "lora_" not in name and "modules_to_save" not in name
    }
    assert now.keys() == base.state_dict().keys()
    for name, tensor in base.state_dict().items():
        if "MultiheadAttention" in request.node.callspec.id and "proj" in name and "weight" in name:
            assert distance(now[name], tensor) < 1e-5, "PEFT adds the change to these and subtracts it again"
        else:
            assert torch.equal(now[name], tensor), name


@every_layer_kind
@every_accumulator
def test_delta_weight_is_the_whole_change(kind, accumulator_rank):
    base, model = kind.filled(accumulator_rank=accumulator_rank)
    layers = {name.replace(".base_layer", ""): layer for name, layer in scalora_layers(model.get_base_model()).items()}
    tensors = saved_tensors(model)
    assert layers.keys() == tensors.keys()
    for name, layer in layers.items():
        expected = as_stored(change_of(tensors[name], SCALE), base, name)[1]
        assert distance(layer.get_delta_weight("default"), expected) < 1e-5


@pytest.mark.parametrize("name", ["Linear", "Conv1D", "Embedding", "Conv2d"])
@every_accumulator
def test_merging_in_float64_is_exact(name, accumulator_rank):
    base, model = KINDS[name].filled(accumulator_rank=accumulator_rank)
    model, x = model.double(), double(KINDS[name].inputs())
    expected = oracle(base, model, x)
    assert all(layer.get_delta_weight("default").dtype == torch.float64 for layer in scalora_layers(model).values())
    assert distance(output(model.merge_and_unload(), x), expected) < 1e-12


# Embeddings.


def test_embedding_with_a_padding_index():
    kind = KINDS["Embedding"]
    base = Embeddings(padding_idx=3).eval()
    x = kind.inputs()
    x[:, 0] = 3
    model = fill(get_peft_model(copy.deepcopy(base), kind.config()), inputs=x)
    assert distance(output(model, x), oracle(base, model, x)) < 1e-5


def test_embedding_that_scales_its_output():
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    base = Embeddings().eval()
    base.emb = Gemma3TextScaledWordEmbedding(VOCABULARY, 12, padding_idx=0, embed_scale=2.5)
    x = tokens()
    model = fill(get_peft_model(copy.deepcopy(base), KINDS["Embedding"].config()), inputs=x)
    expected = oracle(base, model, x)
    assert distance(output(model, x), expected) < 1e-5
    assert distance(output(model, x, adapter_names=["default"] * len(x)), expected) < 1e-5


def test_embedding_lookup_does_not_change_the_accumulator():
    """max_norm makes F.embedding renormalise the rows it looks up in place: never those of saved state."""
    base = Embeddings(max_norm=0.5).eval()
    x = tokens()
    model = get_peft_model(base, KINDS["Embedding"].config())
    train(model, x, 4)
    check_filled(model)
    state = {k: v.clone() for k, v in model.state_dict().items() if "scalora" in k}
    assert state
    output(model.eval(), x)
    for name, tensor in model.state_dict().items():
        if "scalora" in name:
            assert torch.equal(tensor, state[name]), name
