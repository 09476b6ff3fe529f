"""Ways to run the same computation: checkpointing, compiling, exporting, offloading, hooks, odd inputs."""

import copy

import accelerate
import pytest
import torch
from helpers_models import (
    KINDS,
    SCALE,
    Linears,
    change_of,
    check_filled,
    distance,
    double,
    every_accumulator,
    floats,
    grads_of,
    oracle,
    output,
    saved_tensors,
    scalora_layers,
    tiny_llama,
    tokens,
    train,
)
from peft import get_peft_model
from peft.tuners.lora import layer as peft_layer
from torch import nn
from torch.func import functional_call, jvp

from peft_scalora import last_report


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
    ("name", "accumulator_rank", "options"),
    [
        ("Linear", 5, {}),
        ("Linear", 64, {}),
        ("Embedding", 5, {}),
        ("Conv2d", 5, {}),
        ("MultiheadAttention", 5, {}),
        ("Llama", 5, {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [0]}),
    ],
)
def test_compiled_model_trains_like_the_eager_one(fresh_compiler, name, accumulator_rank, options):
    """From the fresh adapter through rescalings to the overfull accumulator, with a scale and without the adapter."""
    kind = KINDS[name]
    base, x = kind.build().eval(), kind.inputs()
    model = get_peft_model(copy.deepcopy(base), kind.config(accumulator_rank=accumulator_rank, **options)).eval()
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


@pytest.mark.filterwarnings("ignore:Converting a tensor to a Python")
def test_traced_model(tmp_path):
    _, model = KINDS["Linear"].filled()
    traced = torch.jit.trace(model, floats(3, 14))
    torch.jit.save(traced, tmp_path / "traced.pt")
    x = KINDS["Linear"].inputs()
    assert distance(torch.jit.load(tmp_path / "traced.pt")(x), output(model, x)) < 1e-5


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
def test_offloaded_weights(name, accumulator_rank):
    """accelerate keeps weights elsewhere and brings them in only while their module is called."""
    _, model = KINDS[name].filled(accumulator_rank=accumulator_rank)
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


@pytest.mark.parametrize("name", ["Linear", "Conv1D", "Embedding", "Conv2d"])
def test_arguments_that_peft_keeps_for_itself_do_not_reach_the_base_layer(name):
    """PEFT's list of them grows: here by one more."""
    _, model = KINDS[name].filled()
    x, layer = KINDS[name].inputs(), next(iter(scalora_layers(model).values()))
    expected = layer(x)
    peft_layer.VARIANT_KWARG_KEYS.append("offsets_of_tomorrow")
    try:
        assert torch.equal(layer(x, **dict.fromkeys(peft_layer.VARIANT_KWARG_KEYS)), expected)
    finally:
        peft_layer.VARIANT_KWARG_KEYS.remove("offsets_of_tomorrow")


@pytest.mark.parametrize("shape", [(14,), (0, 14), (1, 14), (2, 0, 14), (2, 3, 14), (2, 1, 3, 14)])
@every_accumulator
def test_inputs_of_every_shape_and_layout(shape, accumulator_rank):
    base, model = KINDS["Linear"].filled(accumulator_rank=accumulator_rank)
    x = floats(*shape)
    for inputs in (x, x.transpose(0, -2) if x.dim() > 1 else x, floats(*shape[::-1]).permute(*range(x.dim())[::-1])):
        expected = oracle(base, model, inputs)
        assert output(model, inputs).shape == expected.shape
        assert torch.allclose(output(model, inputs).double(), expected, atol=1e-5)
