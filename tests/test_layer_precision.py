"""Low-precision, autocast and quantized bases: the accumulated state stays in float32."""

import copy
import importlib
import warnings

import pytest
import torch
from helpers_models import (
    KINDS,
    SCALE,
    Linears,
    change_of,
    check_filled,
    distance,
    every_accumulator,
    fill,
    floats,
    grads_of,
    oracle,
    output,
    saved_tensors,
    scalora_config,
    scalora_layers,
    train,
)
from peft import PeftModel, get_peft_model
from peft.tuners import lora
from torch import nn

from peft_scalora import rescale

# Precision.


@pytest.mark.parametrize("name", ["Linear", "Embedding", "Conv2d", "MultiheadAttention", "Llama"])
@pytest.mark.parametrize(
    "move",
    [
        lambda m: m.to(torch.bfloat16),
        lambda m: m.half(),
        lambda m: m.double(),
        lambda m: m.to("cpu", torch.float16),
        lambda m: m.to(torch.device("cpu")),
        lambda m: m.bfloat16().double().half().float(),
    ],
    ids=["bfloat16", "half", "double", "device and dtype", "device", "there and back"],
)
def test_accumulated_state_keeps_its_bits(name, move):
    _, model = KINDS[name].filled()
    state = {k: v.clone() for k, v in model.state_dict().items() if "scalora" in k}
    move(model)
    after = {k: v for k, v in model.state_dict().items() if "scalora" in k}
    assert after.keys() == state.keys()
    for key, tensor in after.items():
        assert tensor.dtype == state[key].dtype
        assert torch.equal(tensor, state[key]), key


@pytest.mark.parametrize("name", ["Linear", "Conv1D", "Embedding", "Conv2d", "MultiheadAttention", "Llama"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_forward(name, dtype):
    kind = KINDS[name]
    base, model = kind.filled()
    x = kind.inputs()
    model, low = model.to(dtype), x.to(dtype) if x.is_floating_point() else x
    rounded = copy.deepcopy(base).to(dtype)
    result = output(model, low)
    assert result.dtype == dtype
    tolerance = 0.1 if dtype == torch.bfloat16 else 0.02
    assert (
        distance(result, oracle(rounded.double(), model, low.double() if low.is_floating_point() else low)) < tolerance
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_training_in_low_precision_folds_into_float32(dtype):
    config = KINDS["Linear"].config(accumulator_rank=14)
    model = get_peft_model(Linears().to(dtype), config, autocast_adapter_dtype=False)
    assert model.base_model.model.lin0.lora_A["default"].weight.dtype == dtype
    x = floats(5, 14).to(dtype)
    train(model, x, 6, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05))
    check_filled(model)
    for layer in scalora_layers(model).values():
        assert layer.scalora_U["default"].dtype == layer.scalora_V["default"].dtype == torch.float32
    # Scales are powers of two here: a rescaling moves change from the factors to U V without rounding the factors.
    before = {name: change_of(tensors, SCALE) for name, tensors in saved_tensors(model).items()}
    output(model, x).float().square().mean().backward()
    rescale(model)
    for name, tensors in saved_tensors(model).items():
        assert distance(change_of(tensors, SCALE), before[name]) < 1e-5


@pytest.mark.parametrize("name", ["Linear", "Conv1D", "Embedding", "Conv2d", "MultiheadAttention"])
@every_accumulator
def test_autocast_agrees_with_the_plain_run_within_bfloat16(name, accumulator_rank):
    base, model = KINDS[name].filled(accumulator_rank=accumulator_rank)
    x, grads = KINDS[name].inputs(), []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            result = output(model.train(), x)
        result.float().square().mean().backward()
        grads.append(grads_of(model))
        assert distance(result, oracle(base, model, x)) < (0.03 if enabled else 1e-5)
    assert grads[0]
    for key, grad in grads[0].items():
        assert distance(grads[1][key], grad) < 0.1, key


def test_training_under_autocast_folds_exactly():
    base = Linears().eval()
    model = get_peft_model(copy.deepcopy(base), KINDS["Linear"].config())
    x = floats(5, 14)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    for _ in range(5):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = (output(model, x) - 1).square().mean()
        loss.backward()
        optimizer.step()
    check_filled(model)
    assert distance(output(model.eval(), x), oracle(base, model, x)) < 1e-5


# Quantized bases.


def quantized_linears(bits):
    bnb = pytest.importorskip("bitsandbytes")
    base = Linears()
    for name in ("lin0", "lin1"):
        linear = getattr(base, name)
        if bits == 4:
            new = bnb.nn.Linear4bit(linear.in_features, linear.out_features, compute_dtype=torch.float32)
            new.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4", module=new)
        else:
            new = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, has_fp16_weights=False)
            new.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
        new.bias = nn.Parameter(linear.bias.data, requires_grad=False)
        setattr(base, name, new.to("cpu"))
    base.is_loaded_in_4bit, base.is_loaded_in_8bit = bits == 4, bits == 8
    return base


@pytest.mark.parametrize("bits", [4, 8])
@every_accumulator
def test_quantized_linear(bits, accumulator_rank):
    """Base output of the quantized layer itself, plus the dense change in float64."""
    config = scalora_config(target_modules=["lin0", "lin1"], accumulator_rank=accumulator_rank)
    model = get_peft_model(quantized_linears(bits), config)
    before = {k: v.clone() for k, v in model.state_dict().items() if "base_layer" in k}
    fill(model)
    kind = lora.Linear4bit if bits == 4 else lora.Linear8bitLt
    assert [isinstance(layer, kind) for layer in scalora_layers(model).values()] == [True, True]
    for key, value in before.items():
        assert torch.equal(model.state_dict()[key], value), key
    for name, tensors in saved_tensors(model).items():
        layer = model.base_model.model.get_submodule(name)
        x = floats(5, layer.in_features).requires_grad_()
        change = change_of(tensors, SCALE)
        assert distance(layer.get_delta_weight("default"), change) < 1e-5
        for factor in (1.0, 0.0, 0.5):
            layer.set_scale("default", factor)
            expected = layer.base_layer(x).double() + factor * x.double() @ change.T
            assert distance(layer(x), expected) < 1e-5
        mixed = layer(x, adapter_names=["default", "__base__", "default", "__base__", "__base__"])
        rows = torch.tensor([0.5, 0, 0.5, 0, 0])[:, None]
        assert distance(mixed, layer.base_layer(x).double() + rows * (x.double() @ change.T)) < 1e-5
        direction = floats(5, layer.out_features)
        (x_grad,) = torch.autograd.grad((layer(x) * direction).sum(), x)
        (base_grad,) = torch.autograd.grad((layer.base_layer(x) * direction).sum(), x)
        assert distance(x_grad, base_grad.double() + 0.5 * direction.double() @ change) < 1e-5


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_adapter_is_copied_saved_and_loaded(tmp_path, bits):
    model = fill(get_peft_model(quantized_linears(bits), scalora_config(target_modules=["lin0"])))
    x = floats(5, 14).requires_grad_()  # without a gradient bitsandbytes repacks the weight for widths of 32
    expected = output(model, x)
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(quantized_linears(bits), tmp_path).eval()
    twin = copy.deepcopy(model)
    assert torch.equal(output(loaded, x), expected)
    assert torch.equal(output(twin, x), expected)
    train(twin, x, 2)
    progress = [m.base_model.model.lin0.progress("default").rescalings for m in (model, twin)]
    assert progress == [6, 8]
    assert torch.equal(output(model, x), expected)


def dequantized(layer):
    weight = layer.base_layer.weight
    if hasattr(weight, "quant_state"):
        return importlib.import_module("bitsandbytes").functional.dequantize_4bit(weight.data, weight.quant_state)
    scales = layer.base_layer.state.SCB if weight.SCB is None else weight.SCB
    return weight.data * scales[:, None] / 127


def quantized_and_back(weight, bits):
    if bits == 8:
        scales = weight.abs().amax(1, keepdim=True) / 127
        return (weight / scales).round() * scales
    functional = importlib.import_module("bitsandbytes").functional
    return functional.dequantize_4bit(*functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True))


@pytest.mark.parametrize("bits", [4, 8])
@every_accumulator
def test_merging_into_a_quantized_base_merges_the_whole_change(bits, accumulator_rank):
    """The merged weight is the quantized sum of the base weight and the dense change."""
    config = scalora_config(target_modules=["lin0"], accumulator_rank=accumulator_rank)
    model = fill(get_peft_model(quantized_linears(bits), config))
    layer = model.base_model.model.lin0
    tensors = saved_tensors(model)["lin0"]
    weight = dequantized(layer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer.merge(safe_merge=True)
    expected = quantized_and_back((weight + change_of(tensors, SCALE)).float(), bits)
    plain = quantized_and_back((weight + SCALE * tensors["lora_B"] @ tensors["lora_A"]).float(), bits)
    # Rounding may send an entry that lies between two levels to the other one.
    size = expected.abs().max()
    assert ((dequantized(layer) - expected).abs() < 1e-3 * size).float().mean() > 0.98
    assert ((dequantized(layer) - plain).abs() < 1e-3 * size).float().mean() < 0.9
