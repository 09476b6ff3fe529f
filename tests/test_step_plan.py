"""The adapters that an optimizer steps are looked for once, and again whenever they may be others."""

import copy
import gc
import weakref

import pytest
import torch
from helpers_rescale import NEVER, Net, adapted, backward, layers_of, snapshot, train, trainable
from peft import PeftModel
from torch import nn

from peft_scalora import ScaLoRAConfig
from peft_scalora.layer import ScaLoRALayer


def steps(model, adapter="default"):
    return [layer.progress(adapter).steps for layer in layers_of(model)]


def test_layers_are_not_looked_for_again_in_every_step(monkeypatch):
    model, other = adapted(Net()), nn.Linear(2, 2)
    mine, unrelated = (torch.optim.AdamW(trainable(module), lr=1e-3) for module in (model, other))
    for p in other.parameters():
        p.grad = torch.ones_like(p)
    train(model, mine, 3)
    unrelated.step()
    asked, factors = [], ScaLoRALayer.factors
    monkeypatch.setattr(ScaLoRALayer, "factors", lambda *args: asked.append(args) or factors(*args))
    train(model, mine, 3)
    unrelated.step()
    assert not asked and steps(model) == [6, 6, 6]
    more = adapted(Net())  # from here on there are others to look for
    train(model, mine, 1)
    assert len(asked) >= len(layers_of(model)) + len(layers_of(more))
    assert steps(model) == [7, 7, 7]


def replace_parameters(model, optimizer):
    """As FSDP2 and accelerate: new parameters in the modules and in the optimizer, which has stepped already."""
    new = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None and p.requires_grad:
                new[p] = module._parameters[name] = nn.Parameter(p.detach().clone())
    for group in optimizer.param_groups:
        group["params"] = [new[p] for p in group["params"]]
    optimizer.state.clear()


def replace_parameters_in_place(model, optimizer):
    lists = [group["params"] for group in optimizer.param_groups]
    replace_parameters(model, optimizer)
    for group, params in zip(optimizer.param_groups, lists):
        params[:] = group["params"]
        group["params"] = params


def load_and_assign(model, optimizer):
    """As low_cpu_mem_usage: the tensors of a state dict become the parameters."""
    old = dict(model.named_parameters())
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    new = dict(model.named_parameters())
    names = {id(p): name for name, p in old.items()}
    for group in optimizer.param_groups:
        group["params"] = [new[names[id(p)]].requires_grad_() for p in group["params"]]
    optimizer.state.clear()


def replace_modules(model, optimizer):
    for layer in layers_of(model):
        for held in (layer.lora_A, layer.lora_B):
            held["default"] = copy.deepcopy(held["default"])
    optimizer.param_groups[0]["params"] = trainable(model)
    optimizer.state.clear()


@pytest.mark.parametrize(
    "replace",
    [replace_parameters, replace_parameters_in_place, load_and_assign, replace_modules],
    ids=lambda function: function.__name__,
)
def test_replaced_parameters_are_found(replace):
    model = adapted(Net(), scaling_interval=2)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    train(model, optimizer, 3)
    replace(model, optimizer)
    expected = copy.deepcopy(model)
    fresh = torch.optim.AdamW(trainable(expected), lr=1e-2)
    train(model, optimizer, 3)
    train(expected, fresh, 3)
    assert steps(model) == [6, 6, 6]
    assert [layer.progress("default").rescalings for layer in layers_of(model)] == [3, 3, 3]
    theirs = snapshot(expected)
    assert all(torch.equal(value, theirs[name]) for name, value in snapshot(model).items())


@pytest.mark.parametrize("whole_module", [True, False])
def test_factors_that_the_optimizer_no_longer_steps_are_left_alone(whole_module):
    """The layer has others now, and its accumulator belongs to those."""
    model = adapted(Net(), scaling_interval=4)
    optimizer = torch.optim.SGD(trainable(model), lr=1e-2)
    train(model, optimizer, 3)
    first = layers_of(model)[0]
    if whole_module:
        first.lora_A["default"] = copy.deepcopy(first.lora_A["default"])
    else:
        first.lora_A["default"].weight = nn.Parameter(first.lora_A["default"].weight.detach().clone())
    with pytest.warns(UserWarning, match="steps only one factor"):
        train(model, optimizer, 1)
    assert steps(model) == [3, 4, 4]
    assert [layer.progress("default").rescalings for layer in layers_of(model)] == [0, 1, 1]


def test_adapters_that_come_and_go():
    model = adapted(Net(), scaling_interval=2)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-3)
    train(model, optimizer, 1)
    config = ScaLoRAConfig(r=2, scaling="column", scaling_interval=2, target_modules=["first", "second", "last"])
    model.add_adapter("other", config)
    model.set_adapter("other")
    optimizer.add_param_group({"params": trainable(model)})
    train(model, optimizer, 3)
    assert steps(model, "other") == [3, 3, 3]
    model.set_adapter("default")
    model.delete_adapter("default")
    model.set_adapter("other")
    train(model, optimizer, 2)
    assert steps(model, "other") == [5, 5, 5]
    assert [layer.progress("other").rescalings for layer in layers_of(model)] == [2, 2, 2]


def test_an_adapter_that_is_deleted_and_added_again_counts_anew():
    model = adapted(Net(), scaling_interval=2)
    model.add_adapter("spare", copy.deepcopy(model.peft_config["default"]))
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-3)
    train(model, optimizer, 3)
    config = copy.deepcopy(model.peft_config["default"])
    model.delete_adapter("default")
    model.add_adapter("default", config)
    model.set_adapter("default")
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-3)
    train(model, optimizer, 2)
    assert steps(model) == [2, 2, 2] and steps(model, "spare") == [0, 0, 0]


def test_copies_of_model_and_optimizer_count_their_own_steps():
    model = adapted(Net(), scaling_interval=2)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-3)
    train(model, optimizer, 3)
    other, others = copy.deepcopy((model, optimizer))
    train(other, others, 2)
    train(model, optimizer, 1)
    assert (steps(model), steps(other)) == ([4, 4, 4], [5, 5, 5])


def test_parameter_groups_that_grow_shrink_and_change_their_rates():
    model = adapted(Net(), scaling_interval=1, smoothness=50.0)
    first, *others = layers_of(model)
    for layer in layers_of(model):
        nn.init.normal_(layer.factors("default")[0], std=0.1)
    optimizer = torch.optim.SGD(first.factors("default"), lr=1e-3)
    train(model, optimizer, 1)
    optimizer.add_param_group({"params": [p for layer in others for p in layer.factors("default")], "lr": 1e-3})
    train(model, optimizer, 1)
    assert steps(model) == [2, 1, 1]
    norms = []
    for rate in (1e-3, 1e-1):  # 1 / (L η s²) is the squared norm of the columns
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] = rate
        backward(model)
        optimizer.step()
        norms.append(float(first.factors("default")[0].detach().norm()))
    assert norms[1] < norms[0] / 5
    del optimizer.param_groups[1]
    train(model, optimizer, 1)
    assert steps(model) == [5, 3, 3]


def test_steps_are_saved_and_resumed_exactly(tmp_path):
    """Three steps, a folder, three more: as six in one go, rescaling at the fourth."""
    start = adapted(Net(), scaling_interval=4)
    whole, broken = copy.deepcopy(start), copy.deepcopy(start)
    train(whole, torch.optim.SGD(trainable(whole), lr=1e-2), 6)
    train(broken, torch.optim.SGD(trainable(broken), lr=1e-2), 3)
    broken.save_pretrained(tmp_path)
    base = copy.deepcopy(start).unload()
    resumed = PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    assert steps(resumed) == [3, 3, 3]
    train(resumed, torch.optim.SGD(trainable(resumed), lr=1e-2), 3)
    expected = snapshot(whole)
    assert all(torch.equal(value, expected[name]) for name, value in snapshot(resumed).items())


def test_an_optimizer_keeps_no_layer_alive():
    model = adapted(Net(), scaling_interval=NEVER)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-3)
    train(model, optimizer, 2)
    base = weakref.ref(layers_of(model)[0].base_layer.weight)
    del model
    gc.collect()
    assert base() is None
    optimizer.step()
