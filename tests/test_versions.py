"""What version 0.1 saved is still read: folders, checkpoints of the whole model, and pickles.

Its adapters lie in fixtures/version-0.1 with the outputs that it computed: rank 2 on a network of two linear layers,
six steps with a rescaling at each, into a "factored" accumulator of 5 columns and into a "dense" one, which kept the
change itself (out x in) and is now a factored one that loses nothing.
"""

import copy
from pathlib import Path

import pytest
import torch
from helpers_models import distance
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from peft_scalora import ScaLoRAConfig, export_lora
from peft_scalora.export.info import adapter_info
from peft_scalora.layer import ScaLoRALayer

SAVED = Path(__file__).parent / "fixtures" / "version-0.1"
EXPECTED = load_file(SAVED / "expected.safetensors")
X = EXPECTED["x"]
every_kind = pytest.mark.parametrize("kind", ["factored", "dense"])


def base_model() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4))
    model.load_state_dict({k.removeprefix("base."): v for k, v in EXPECTED.items() if k.startswith("base.")})
    return model.eval()


def loaded(kind: str, **kwargs) -> PeftModel:
    return PeftModel.from_pretrained(base_model(), SAVED / kind, **kwargs).eval()


def ranks(model: nn.Module) -> list[tuple[int, int]]:
    """Return (R, columns in use) by layer."""
    accumulators = [layer.accumulator("default") for layer in model.modules() if isinstance(layer, ScaLoRALayer)]
    return [(accumulator.capacity, accumulator.columns) for accumulator in accumulators]


def train(model: nn.Module, steps: int) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()


@every_kind
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_folder_loads_and_is_saved_again(tmp_path, kind, low_cpu_mem_usage):
    model = loaded(kind, low_cpu_mem_usage=low_cpu_mem_usage)
    assert ranks(model) == ([(6, 6), (4, 4)] if kind == "dense" else [(5, 5), (4, 4)])
    assert distance(model(X), EXPECTED[kind]) < 1e-6
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base_model(), tmp_path).eval()
    assert again.peft_config["default"].accumulator == "factored"
    assert again.peft_config["default"].accumulator_rank == (6 if kind == "dense" else 5)
    assert distance(again(X), EXPECTED[kind]) < 1e-6


@every_kind
def test_a_folder_can_be_inspected_and_exported_without_its_base(tmp_path, kind):
    from peft_scalora.export.lora import export_folder

    columns = [layer["accumulated_columns"] for layer in adapter_info(str(SAVED / kind))["layers"].values()]
    assert columns == ([6, 4] if kind == "dense" else [5, 4])
    export_folder(str(SAVED / kind), str(tmp_path / "plain"))
    assert distance(PeftModel.from_pretrained(base_model(), tmp_path / "plain")(X), EXPECTED[kind]) < 1e-6


@every_kind
def test_training_goes_on(tmp_path, kind):
    model = loaded(kind, is_trainable=True)
    train(model, 4)
    export_lora(model.eval(), tmp_path / "plain")
    plain = PeftModel.from_pretrained(base_model(), tmp_path / "plain")
    assert distance(model(X), EXPECTED[kind]) > 1e-3
    assert distance(plain(X), model(X)) < 1e-5


@every_kind
def test_a_checkpoint_of_the_whole_model_loads(kind):
    """accelerate's save_state and DeepSpeed save state dicts of the whole model."""
    state = torch.load(SAVED / kind / "checkpoint.pt", weights_only=True)["model"]
    rank = {"factored": 5, "dense": 64}[kind]
    config = ScaLoRAConfig(r=2, lora_alpha=3, scaling="column", target_modules=["0", "2"], accumulator_rank=rank)
    model = get_peft_model(base_model(), config).eval()
    model.load_state_dict(state)
    assert distance(model(X), EXPECTED[kind]) < 1e-6


@every_kind
def test_a_pickle_loads_and_trains(kind):
    model = torch.load(SAVED / kind / "model.pt", weights_only=False)
    assert distance(model(X), EXPECTED[kind]) < 1e-6
    twin = copy.deepcopy(model)
    assert distance(twin(X), EXPECTED[kind]) < 1e-6
    train(twin, 4)
    layers = [layer for layer in twin.modules() if isinstance(layer, ScaLoRALayer)]
    assert [layer.progress("default").rescalings for layer in layers] == [10, 10]
    assert distance(model(X), EXPECTED[kind]) < 1e-6


def test_a_dense_adapter_does_not_fit_an_accumulator_that_would_lose_some_of_it():
    state = torch.load(SAVED / "dense" / "checkpoint.pt", weights_only=True)["model"]
    config = ScaLoRAConfig(r=2, lora_alpha=3, scaling="column", target_modules=["0", "2"], accumulator_rank=5)
    with pytest.raises(RuntimeError, match="size mismatch"):
        get_peft_model(base_model(), config).load_state_dict(state)


def test_an_accumulator_that_is_empty_stays_empty():
    state = torch.load(SAVED / "dense" / "checkpoint.pt", weights_only=True)["model"]
    fresh = {k: torch.zeros_like(v) if "scalora_U" in k or "scalora_progress" in k else v for k, v in state.items()}
    config = ScaLoRAConfig(r=2, lora_alpha=3, scaling="column", target_modules=["0", "2"], accumulator_rank=64)
    model = get_peft_model(base_model(), config)
    model.load_state_dict(fresh)
    assert ranks(model) == [(6, 0), (4, 0)]
    for layer in model.modules():
        if isinstance(layer, ScaLoRALayer):
            assert not layer.scalora_U["default"].any() and not layer.scalora_V["default"].any()
