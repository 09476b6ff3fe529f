"""Training on two gloo processes, under every engine, equals training on one."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_scalora import ScaLoRAConfig, rescale
from peft_scalora.rescaling.sharding import CHECK_RANKS, check_ranks

SCRIPT = pathlib.Path(__file__).with_name("distributed_train.py")
ENGINES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")


# Engine, ranks before and after, and the step where it stops: on a rescaling, or between two. ZeRO's own checkpoints
# are read by as many ranks as wrote them.
BROKEN = (
    ("ddp", 2, 1, 15),
    ("ddp", 1, 2, 16),
    ("fsdp2", 2, 1, 16),
    ("fsdp2", 1, 2, 15),
    ("zero2", 2, 2, 16),
    ("zero3", 2, 2, 15),
)


def launch(folder, processes, runs):
    """Train under all engines in one start of the processes, whose imports take most of the time."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", CHECK_RANKS: "1"}
    process = subprocess.run(
        [*command, str(SCRIPT), str(folder), json.dumps(runs)], capture_output=True, text=True, env=environment
    )
    assert process.returncode == 0, process.stderr[-3000:]


def name_of(engine, before, after, stop):
    return f"{engine}-{before}-{after}-{stop}"


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Return a function that reads what a run ended with."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    folder = tmp_path_factory.mktemp("distributed")
    first = {1: {}, 2: {}}
    second = {1: {}, 2: {}}
    for engine in ENGINES:
        # DeepSpeed clips what is rescaled already: the norm, and so the factor, is another one.
        first[2][engine] = {"engine": engine, "accumulate": 2, "clip": 0.0 if engine.startswith("zero") else 0.5}
    for engine, before, after, stop in BROKEN:
        name = name_of(engine, before, after, stop)
        checkpoint = str(folder / f"checkpoint-{name}")
        first[before][f"{name}-before"] = {"engine": engine, "last": stop, "save": checkpoint}
        second[after][name] = {"engine": engine, "first": stop, "load": checkpoint}
    for runs in (first, second):
        for processes in (1, 2):
            launch(folder, processes, runs[processes])
    return lambda name: torch.load(folder / f"{name}.pt")


def change(state, layer):
    """s B A + U V of one layer, in float64."""
    get = {name.split(f".{layer}.")[1]: t.double() for name, t in state.items() if f".{layer}." in name}
    B, A = get["lora_B.default.weight"], get["lora_A.default.weight"]
    U, V = get["scalora_U.default.weight"], get["scalora_V.default.weight"]
    return 8 / B.shape[1] * B @ A + U @ V


def assert_same_adapter(adapter, single):
    assert adapter.keys() == single.keys()
    progress = [tensor.tolist() for name, tensor in adapter.items() if "progress" in name]
    assert progress == [[30, 10, 7]] * 2
    for layer in "02":
        expected = change(single, layer)
        assert float((change(adapter, layer) - expected).norm()) < 1e-6 * float(expected.norm())


@pytest.mark.parametrize("engine", ENGINES)
def test_two_ranks_hold_the_same_bits_and_the_weights_of_one_process(engine, results):
    """With gradient accumulation; 30 steps, a rescaling every third."""
    result = results(engine)
    first, second = result["states"]
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert_same_adapter(first, result["single"])
    for layer in "02":
        A, B = (result["sent"][f"base_model.model.{layer}.lora_{part}.weight"].double() for part in "AB")
        expected = change(first, layer)
        assert A.shape[0] == B.shape[1] == 3 + 7
        assert float((B @ A - expected).norm()) < 1e-6 * float(expected.norm())


@pytest.mark.slow  # by its fixture, whose time is counted where it is asked for first
@pytest.mark.parametrize("engine, before, after, stop", BROKEN)
def test_resumed_on_another_number_of_ranks_it_equals_the_unbroken_run(engine, before, after, stop, results):
    result = results(name_of(engine, before, after, stop))
    assert_same_adapter(result["states"][0], result["single"])


def test_ranks_that_differ_are_found(monkeypatch):
    monkeypatch.setenv(CHECK_RANKS, "1")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    theirs = {"U": torch.tensor([1.0, 2.0]), "V": torch.tensor([[-0.0, 3.0]])}
    seen = []
    monkeypatch.setattr(torch.distributed, "broadcast", lambda tensor, src: seen.append(tensor.clone()))
    check_ranks(theirs.items())
    monkeypatch.setattr(torch.distributed, "broadcast", lambda tensor, src: tensor.copy_(seen[0]))
    check_ranks(theirs.items())
    for changed in (
        {"U": torch.tensor([2.0, 1.0])},
        {"U": torch.tensor([1.0, 2.0000002])},
        {"V": torch.tensor([[0.0, 3.0]])},
    ):
        with pytest.raises(RuntimeError, match=f"rank 1 differs from rank 0 in {next(iter(changed))}"):
            check_ranks((theirs | changed).items())


def test_adapters_of_which_some_are_sharded_are_refused():
    class Sharded(nn.Parameter):
        def full_tensor(self):
            raise AssertionError("nothing may be read before the refusal")

    base = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 6))
    model = get_peft_model(base, ScaLoRAConfig(target_modules=["0", "1"], r=2, scaling="column"))
    model(torch.randn(3, 6)).sum().backward()
    layer = model.base_model.model[0]
    for factor in (layer.lora_A["default"], layer.lora_B["default"]):
        factor.weight = Sharded(factor.weight.data)
    with pytest.raises(TypeError, match="some are sharded and some are not"):
        rescale(model)


def test_flattened_parameters_are_refused():
    """What FSDP1 makes of a parameter with use_orig_params=True."""
    model = get_peft_model(nn.Sequential(nn.Linear(6, 5)), ScaLoRAConfig(target_modules=["0"], r=2, scaling="column"))
    model(torch.randn(3, 6)).sum().backward()
    layer = model.base_model.model[0]
    for factor in (layer.lora_A["default"], layer.lora_B["default"]):
        flat = nn.Parameter(factor.weight.data.flatten())
        flat.grad, factor.weight = factor.weight.grad.flatten(), flat
    with pytest.raises(TypeError, match="FSDP1"):
        rescale(model)
