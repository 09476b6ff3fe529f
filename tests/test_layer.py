"""Every kind of ScaLoRA layer, with a filled accumulator, against the explicit dense weight W + s B A + U V."""

import copy
import importlib
import math
import warnings

import accelerate
import pytest
import torch
from helpers_models import (
    KINDS,
    VOCABULARY,
    Convolution,
    Embeddings,
    Linears,
    as_stored,
    change_of,
    check_filled,
    dense_weights,
    distance,
    fill,
    floats,
    oracle,
    output,
    saved_tensors,
    scalora_config,
    scalora_layers,
    tiny_llama,
    tokens,
    train,
    with_weights,
)
from peft import LoraConfig, PeftModel, get_peft_model
from peft.helpers import rescale_adapter_scale
from peft.tuners import lora
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.func import functional_call, jvp

from peft_scalora import rescale
from peft_scalora.rescale import last_report

SCALE = 1.5  # lora_alpha / r of scalora_config
ACCUMULATORS = ["factored", "dense"]
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
every_accumulator = pytest.mark.parametrize("accumulator", ACCUMULATORS)
# Attention merges and unmerges its float32 base weights at every call, which rounds them.
DOUBLE = {"MultiheadAttention": 1e-6}


def double(x):
    return x.double() if x.is_floating_point() else x


def factor_parameters(model, adapter="default"):
    """Layer name in the base model -> {"lora_A": parameter, "lora_B": parameter}, found by their public names."""
    found = {}
    for name, parameter in model.named_parameters():
        parts = name.removeprefix("base_model.model.").removesuffix(".weight").split(".")
        if parts[-1] == adapter and parts[-2].startswith("lora_"):
            layer = ".".join(part for part in parts[:-2] if part != "base_layer")
            found.setdefault(layer, {})[parts[-2]] = parameter
    return found


# The function.


@every_kind
@every_accumulator
def test_forward_is_that_of_the_dense_weight(kind, accumulator):
    base, model = kind.filled(accumulator=accumulator)
    x = kind.inputs()
    expected = oracle(base, model, x)
    assert distance(output(model, x), expected) < 1e-5
    without = {name: {k: v for k, v in t.items() if "scalora" not in k} for name, t in saved_tensors(model).items()}
    assert distance(with_weights(base, dense_weights(base, without, SCALE), x), expected) > 0.03


@every_kind
@every_accumulator
def test_forward_and_gradients_in_float64(request, kind, accumulator):
    """lora_A, lora_B and the input get the gradients that autograd gives the explicit model."""
    base, model = kind.filled(accumulator=accumulator)
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


@every_kind
def test_training_moves_the_function_past_rank_r(kind):
    _, model = kind.filled(accumulator="dense")
    for layer, tensors in saved_tensors(model).items():
        change = change_of(tensors, SCALE)
        assert torch.linalg.matrix_rank(change, rtol=1e-5) > min(2, min(change.shape) - 1), layer


@every_kind
@every_accumulator
def test_disabled_adapter_is_the_base_model(request, kind, accumulator):
    base, model = kind.filled(accumulator=accumulator)
    x = kind.inputs()
    with model.disable_adapter():
        disabled = output(model, x)
    attention = "MultiheadAttention" in request.node.callspec.id
    assert distance(disabled, output(base, x)) < (1e-5 if attention else 1e-30)
    assert distance(output(model, x), output(base, x)) > 0.05


@every_kind
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


@every_kind
@every_accumulator
def test_delta_weight_is_the_whole_change(kind, accumulator):
    base, model = kind.filled(accumulator=accumulator)
    layers = {name.replace(".base_layer", ""): layer for name, layer in scalora_layers(model.get_base_model()).items()}
    tensors = saved_tensors(model)
    assert layers.keys() == tensors.keys()
    for name, layer in layers.items():
        expected = as_stored(change_of(tensors[name], SCALE), base, name)[1]
        assert distance(layer.get_delta_weight("default"), expected) < 1e-5


@pytest.mark.parametrize("name", ["Linear", "Conv1D", "Embedding", "Conv2d"])
@every_accumulator
def test_merging_in_float64_is_exact(name, accumulator):
    base, model = KINDS[name].filled(accumulator=accumulator)
    model, x = model.double(), double(KINDS[name].inputs())
    expected = oracle(base, model, x)
    assert all(layer.get_delta_weight("default").dtype == torch.float64 for layer in scalora_layers(model).values())
    assert distance(output(model.merge_and_unload(), x), expected) < 1e-12


# Merging.


@every_kind
@every_accumulator
@pytest.mark.parametrize("safe_merge", [False, True])
def test_merge_and_unmerge(kind, accumulator, safe_merge):
    base, model = kind.filled(accumulator=accumulator)
    x = kind.inputs()
    expected = oracle(base, model, x)
    model.merge_adapter(safe_merge=safe_merge)
    assert distance(output(model, x), expected) < 1e-5
    model.unmerge_adapter()
    assert distance(output(model, x), expected) < 1e-5
    with model.disable_adapter():
        assert distance(output(model, x), output(base, x)) < 1e-5


@every_kind
@every_accumulator
def test_merge_and_unload_gives_the_plain_model(kind, accumulator):
    base, model = kind.filled(accumulator=accumulator)
    x = kind.inputs()
    expected = oracle(base, model, x)
    plain = model.merge_and_unload(safe_merge=True)
    assert type(plain) is type(base)
    assert plain.state_dict().keys() == base.state_dict().keys()
    assert not any(isinstance(module, LoraLayer) for module in plain.modules())
    assert distance(output(plain, x), expected) < 1e-5


@every_kind
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


@every_kind
@every_accumulator
def test_set_scale_scales_the_whole_change(kind, accumulator):
    base, model = kind.filled(accumulator=accumulator)
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
def test_scale_layer_unscale_layer_and_rescale_adapter_scale(name, accumulator):
    options = {"target_modules": ["q_proj", "down_proj"]} if name == "Llama" else {}
    base, model = KINDS[name].filled(accumulator=accumulator, **options)
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
    base, model = KINDS["Linear"].filled(rank_pattern={"lin0": 4}, alpha_pattern={"lin1": 8}, accumulator_rank=None)
    scale = {"lin0": 3 / 4, "lin1": 8 / 2}
    assert distance(output(model, floats(5, 14)), oracle(base, model, floats(5, 14), scale=scale)) < 1e-5
    lin0, lin1 = model.base_model.model.lin0, model.base_model.model.lin1
    assert lin0.scalora_U["default"].shape == (18, 14), "8 r = 32 is more than min(in, out) = 14"
    assert lin1.scalora_U["default"].shape == (10, 10), "8 r = 16 is more than min(in, out) = 10"


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
def test_autocast_agrees_with_the_plain_run_within_bfloat16(name, accumulator):
    base, model = KINDS[name].filled(accumulator=accumulator)
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


# Ways to run the same computation.


def grads_of(model):
    return {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}


def trained_states(model):
    return {k: v.clone() for k, v in model.state_dict().items() if "lora_" in k}


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(use_reentrant):
    base = tiny_llama()
    config = KINDS["Llama"].config(target_modules=["q_proj", "v_proj", "down_proj"])
    results = []
    for checkpointing in (False, True):
        torch.manual_seed(3)
        model = get_peft_model(copy.deepcopy(base), config)
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.config.use_cache = False
        model.train()
        assert model.base_model.model.is_gradient_checkpointing == checkpointing
        train(model, tokens(), 5)
        check_filled(model)
        results.append(trained_states(model))
    for name, tensor in results[0].items():
        assert torch.allclose(results[1][name].float(), tensor.float(), rtol=1e-4, atol=1e-6), name


def test_gradient_accumulation_equals_the_full_batch():
    base = Linears()
    x, y = floats(8, 14), floats(8, 10)
    results = []
    for parts in (1, 4):
        torch.manual_seed(3)
        model = get_peft_model(copy.deepcopy(base), KINDS["Linear"].config())
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
        for _ in range(5):
            optimizer.zero_grad()
            for part_x, part_y in zip(x.chunk(parts), y.chunk(parts)):
                ((model(part_x) - part_y).square().mean() / parts).backward()
            optimizer.step()
        check_filled(model)
        results.append(saved_tensors(model))
        assert all(layer.progress("default").steps == 5 for layer in scalora_layers(model).values())
    for name, tensors in results[0].items():
        assert distance(change_of(results[1][name], SCALE), change_of(tensors, SCALE)) < 1e-4


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def check_same_as_eager(compiled, model, x):
    """Forward and backward of one model, compiled and not."""
    expected = []
    for m in (model, compiled):
        model.zero_grad()
        result = output(m, x)
        (result - 1).square().mean().backward()
        expected.append((result, grads_of(model)))
    (result, grads), (compiled_result, compiled_grads) = expected
    assert distance(compiled_result, result) < 1e-5
    assert grads
    for key, grad in grads.items():
        assert distance(compiled_grads[key], grad) < 1e-4, key


@pytest.mark.parametrize(
    ("name", "accumulator", "options"),
    [
        ("Linear", "factored", {}),
        ("Linear", "dense", {}),
        ("Embedding", "factored", {}),
        ("Embedding", "dense", {}),
        ("Conv2d", "factored", {}),
        ("Conv2d", "dense", {}),
        ("MultiheadAttention", "factored", {}),
        ("Llama", "factored", {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [0]}),
    ],
)
def test_compiled_model_trains_like_the_eager_one(fresh_compiler, name, accumulator, options):
    """From the fresh adapter through rescalings to the overfull accumulator, with a scale and without the adapter."""
    kind = KINDS[name]
    base, x = kind.build().eval(), kind.inputs()
    model = get_peft_model(copy.deepcopy(base), kind.config(accumulator=accumulator, **options)).eval()
    compiled = torch.compile(model, backend="aot_eager")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    for _ in range(4):
        check_same_as_eager(compiled, model, x)
        optimizer.step()
    check_filled(model)
    assert distance(output(compiled, x), oracle(base, model, x)) < 1e-4
    if name == "Linear":
        for layer in scalora_layers(model).values():
            layer.set_scale("default", 0.5)
        assert distance(output(compiled, x), oracle(base, model, x, factor=0.5)) < 1e-4
        with model.disable_adapter():
            assert torch.equal(output(compiled, x), output(base, x))


def test_filling_the_accumulator_does_not_recompile(fresh_compiler):
    kind = KINDS["Linear"]
    model = get_peft_model(kind.build(), kind.config(accumulator_rank=8))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    columns = []
    for _ in range(6):
        check_same_as_eager(compiled, model, kind.inputs())
        optimizer.step()
        columns.append(model.base_model.model.lin0.progress("default").columns)
    assert columns == [2, 4, 6, 8, 8, 8]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_exported_program():
    _, model = KINDS["Linear"].filled()
    exported = torch.export.export(model.base_model.model, (floats(5, 14),))
    assert distance(exported.module()(floats(5, 14)), output(model, floats(5, 14))) < 1e-6


@pytest.mark.parametrize("name", ["Linear", "Embedding", "Conv2d"])
def test_forward_mode_derivative(name):
    """Against a central difference in float64."""
    _, model = KINDS[name].filled()
    model, x = model.double(), double(KINDS[name].inputs())
    point = {k: p.detach() for k, p in model.named_parameters() if p.requires_grad}
    direction = {k: torch.randn_like(p) for k, p in point.items()}

    def function(parameters):
        return functional_call(model, parameters, (x,))

    def at(step):
        return function({k: p + step * direction[k] for k, p in point.items()})

    _, derivative = jvp(function, (point,), (direction,))
    assert distance(derivative, (at(1e-5) - at(-1e-5)) / 2e-5) < 1e-6


@pytest.mark.slow
def test_inductor(fresh_compiler):
    """The whole model as one graph, around a rescaling."""
    kind = KINDS["Linear"]
    base, model = kind.filled(accumulator_rank=14)
    x, compiled = kind.inputs(), torch.compile(model, fullgraph=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    check_same_as_eager(compiled, model, x)
    optimizer.step()
    assert last_report(optimizer).skipped == 0
    check_same_as_eager(compiled, model, x)
    assert distance(output(compiled, x), oracle(base, model, x)) < 1e-4


@pytest.mark.parametrize("name", ["Linear", "Conv1D", "Conv2d"])  # PEFT's embedding layers cannot be offloaded
@every_accumulator
def test_offloaded_weights(name, accumulator):
    """accelerate keeps weights elsewhere and brings them in only while their module is called."""
    _, model = KINDS[name].filled(accumulator=accumulator)
    expected = output(model, KINDS[name].inputs())
    accelerate.cpu_offload(model, execution_device="cpu")
    assert all(parameter.is_meta for parameter in model.parameters())
    with torch.no_grad():
        assert distance(output(model, KINDS[name].inputs()), expected) < 1e-5


@pytest.mark.parametrize(
    "register",
    [
        lambda module, hook: module.register_forward_hook(hook),
        lambda module, hook: module.register_forward_pre_hook(hook),
        lambda module, hook: module.register_full_backward_hook(hook),
        lambda module, hook: module.register_full_backward_pre_hook(hook),
    ],
    ids=["forward", "forward_pre", "backward", "backward_pre"],
)
@pytest.mark.parametrize("factor", ["lora_A", "lora_B", "base_layer"])
def test_hooks_on_the_parts_of_a_layer_run(register, factor):
    """Engines that shard parameters gather them in such hooks."""
    _, model = KINDS["Linear"].filled()
    calls, module = [], getattr(model.base_model.model.lin1, factor)
    x = floats(5, 14).requires_grad_()
    expected = torch.autograd.grad(output(model, x).square().sum(), x)[0]
    handle = register(module["default"] if factor != "base_layer" else module, lambda *args: calls.append(1))
    result = torch.autograd.grad(output(model, x).square().sum(), x)[0]
    handle.remove()
    assert calls == [1]
    assert distance(result, expected) < 1e-5


@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_replaced_factor_modules_are_called(factor):
    """By a subclass, or by another `forward` on the instance as accelerate and others do."""
    _, model = KINDS["Linear"].filled()
    x = floats(5, 14)
    parts = getattr(model.base_model.model.lin1, factor)
    with torch.no_grad():
        expected = copy.deepcopy(model)
        getattr(expected.base_model.model.lin1, factor)["default"].weight *= 2
        expected = output(expected, x)
        plain = parts["default"].forward
        parts["default"].forward = lambda hidden: 2 * plain(hidden)
        assert distance(output(model, x), expected) < 1e-5
        del parts["default"].forward

        class Doubled(nn.Linear):
            def forward(self, hidden):
                return 2 * super().forward(hidden)

        parts["default"].__class__ = Doubled
        assert distance(output(model, x), expected) < 1e-5


@pytest.mark.parametrize("name", ["Linear", "Conv1D", "Embedding", "Conv2d"])
def test_no_adapter_names_is_the_active_adapter(name):
    _, model = KINDS[name].filled()
    x, layer = KINDS[name].inputs(), next(iter(scalora_layers(model).values()))
    assert torch.equal(layer(x, adapter_names=None), layer(x))


@pytest.mark.parametrize("shape", [(14,), (0, 14), (1, 14), (2, 0, 14), (2, 3, 14), (2, 1, 3, 14)])
@every_accumulator
def test_inputs_of_every_shape_and_layout(shape, accumulator):
    base, model = KINDS["Linear"].filled(accumulator=accumulator)
    x = floats(*shape)
    for inputs in (x, x.transpose(0, -2) if x.dim() > 1 else x, floats(*shape[::-1]).permute(*range(x.dim())[::-1])):
        expected = oracle(base, model, inputs)
        assert output(model, inputs).shape == expected.shape
        assert torch.allclose(output(model, inputs).double(), expected, atol=1e-5)


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
def test_quantized_linear(bits, accumulator):
    """Base output of the quantized layer itself, plus the dense change in float64."""
    config = scalora_config(target_modules=["lin0", "lin1"], accumulator=accumulator)
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
def test_merging_into_a_quantized_base_merges_the_whole_change(bits, accumulator):
    """The merged weight is the quantized sum of the base weight and the dense change."""
    config = scalora_config(target_modules=["lin0"], accumulator=accumulator)
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
