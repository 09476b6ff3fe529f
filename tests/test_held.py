"""Counts that the host works with are to everybody else a buffer that moves with the model, and is never stale."""

import copy
import pickle
import sys
from collections import Counter
from itertools import chain

import pytest
import torch
import torch.distributed as dist
from helpers_models import KINDS, distance, fill, floats, output, scalora_config, scalora_layers, train
from peft import get_peft_model, get_peft_model_state_dict
from torch import nn
from torch.distributed.utils import _sync_module_states
from torch.optim.swa_utils import AveragedModel

every_kind = pytest.mark.parametrize("name", ["Linear", "Embedding", "Conv2d", "MultiheadAttention", "GPT-2", "BERT"])


def counts(model: nn.Module, adapter: str = "default") -> list[list[int]]:
    return [list(layer.progress(adapter).numbers) for layer in scalora_layers(model).values()]


def saved_counts(state: dict) -> list[list[int]]:
    return [tensor.tolist() for key, tensor in state.items() if "scalora_progress" in key]


@every_kind
def test_all_that_a_model_holds_is_on_one_device(name):
    _, model = KINDS[name].filled()
    before = counts(model)
    model.to("meta")
    assert {tensor.device.type for tensor in chain(model.parameters(), model.buffers())} == {"meta"}
    assert counts(model) == before


def test_data_parallel_takes_the_model():
    """The check is torch's own; only scattering needs devices that are not here."""
    _, model = KINDS["Linear"].filled()
    parallel = nn.DataParallel(model.to("meta"))
    parallel.device_ids = [0]
    parallel.src_device_obj = torch.device("meta")
    parallel.scatter = lambda inputs, kwargs, device_ids: ([inputs], [kwargs])
    assert parallel(floats(5, 14).to("meta")).shape == (5, 10)


@pytest.mark.parametrize("wrap", [lambda model: model, nn.Sequential], ids=["outermost", "inside another module"])
def test_distributed_data_parallel_sends_what_is_on_the_device(monkeypatch, wrap):
    """NCCL takes no tensor of the CPU; a list of what to leave out is read on the outermost module only."""
    sent = []
    monkeypatch.setattr(dist, "_broadcast_coalesced", lambda group, tensors, *args: sent.extend(tensors))
    model = wrap(KINDS["Linear"].filled()[1].to("meta"))
    ignored = getattr(model, "_ddp_params_and_buffers_to_ignore", [])
    _sync_module_states(model, None, 2**20, 0, ignored)
    assert sent and {tensor.device.type for tensor in sent} == {"meta"}


@pytest.mark.parametrize("trainable", ["factors", "base", "bias", "all"])
def test_a_replica_of_data_parallel_has_the_gradients_of_the_model(monkeypatch, trainable):
    """Its weights are no parameters: a base layer that is trained must not be taken for a frozen one."""
    _, model = KINDS["Linear"].filled()
    for name, parameter in model.named_parameters():
        is_bias = name.endswith("bias")
        wanted = {"factors": "lora_" in name, "base": "base_layer" in name, "bias": is_bias, "all": True}
        parameter.requires_grad_(wanted[trainable])
    x = floats(5, 14)
    model(x).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert expected
    model.zero_grad()
    monkeypatch.setattr(
        sys.modules["torch.nn.parallel.replicate"],
        "_broadcast_coalesced_reshape",
        lambda tensors, devices, detach=False: [[t.clone() for t in tensors] for _ in devices],
    )
    for replica in nn.parallel.replicate(model, [0, 1]):
        assert not list(replica.parameters())
        assert distance(replica(x), model(x)) < 1e-6
        replica(x).square().sum().backward()
    for name, gradient in expected.items():
        assert distance(model.get_parameter(name).grad, 2 * gradient) < 1e-5, name


@every_kind
def test_whoever_asks_gets_the_counts_of_now(name):
    """A state dict, a copy, a pickle, an adapter's state, and tools that gather buffers by themselves."""
    _, model = KINDS[name].filled()
    train(model, KINDS[name].inputs(), 2)
    expected = [[8, 8, columns] for *_, columns in counts(model)]
    assert all(columns for *_, columns in expected)
    assert saved_counts(model.state_dict()) == expected
    train(model, KINDS[name].inputs(), 1)
    expected = [[9, 9, columns] for *_, columns in counts(model)]
    assert saved_counts(dict(model.named_buffers())) == expected
    assert counts(copy.deepcopy(model)) == counts(pickle.loads(pickle.dumps(model))) == expected
    assert saved_counts(get_peft_model_state_dict(model, save_embedding_layers=False)) == expected
    train(model, KINDS[name].inputs(), 1)
    gathered = [b.tolist() for n, m in model.named_modules() for _, b in m.named_buffers(recurse=False) if "prog" in n]
    assert gathered == [[10, 10, columns] for *_, columns in expected]
    assert counts(model) == gathered


@pytest.mark.parametrize(
    "read",
    [
        lambda buffers: buffers["weight"],
        lambda buffers: buffers.get("weight"),
        lambda buffers: next(iter(buffers.values())),
        lambda buffers: dict(buffers.items())["weight"],
    ],
    ids=["by name", "get", "values", "items"],
)
def test_a_dictionary_of_buffers_is_up_to_date_however_it_is_read(read):
    _, model = KINDS["Linear"].filled()
    layer = scalora_layers(model)["base_model.model.lin0"]
    holder = layer.scalora_progress.get_submodule("default")
    layer.progress("default").steps = 41
    layer.progress("default").rescalings = 40
    assert read(holder._buffers).tolist()[:2] == [41, 40]


def test_what_is_written_to_the_buffer_counts():
    """By name, as hotswapping does past autograd; by walking the buffers; by assignment; by loading."""
    _, model = KINDS["Linear"].filled()
    layer = scalora_layers(model)["base_model.model.lin0"]
    assert layer.progress("default").steps == 6
    layer.scalora_progress["default"].data.copy_(torch.tensor([1, 2, 3]))
    assert layer.progress("default").numbers == [1, 2, 3]
    for name, buffer in layer.named_buffers():
        if "scalora_progress" in name:
            buffer.add_(1)
    assert layer.progress("default").numbers == [2, 3, 4]
    layer.scalora_progress.get_submodule("default").weight = torch.tensor([3, 4, 5], dtype=torch.bfloat16)
    assert layer.progress("default").numbers == [3, 4, 5]
    assert layer.scalora_progress["default"].dtype == torch.int64
    layer.progress("default").steps += 1
    layer.load_state_dict({"scalora_progress.default.weight": torch.tensor([5, 6, 5])}, strict=False)
    assert layer.progress("default").numbers == [5, 6, 5]


def test_an_averaged_model_has_the_accumulated_change():
    """torch's AveragedModel averages parameters and copies buffers, which it walks by itself."""
    base, x = KINDS["Linear"].build().eval(), floats(5, 14)
    # Not "merged": the base weights that it averages hold the accumulated change then.
    config = scalora_config(target_modules=["lin0", "lin1"], accumulator="factored")
    model = get_peft_model(copy.deepcopy(base), config)
    averaged = AveragedModel(model, avg_fn=lambda old, new, count: new)
    fill(model)
    averaged.update_parameters(model)
    assert Counter(map(tuple, counts(averaged))) == Counter(map(tuple, counts(model)))
    assert distance(output(averaged.eval(), x), output(model.eval(), x)) < 1e-6
