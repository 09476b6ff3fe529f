"""Several adapters on one model, and copies of a model."""

import copy
import os

import pytest
import torch
from helpers_adapters import every_kind, run_python, state_of, two_adapters
from helpers_models import (
    KINDS,
    SCALE,
    dense_weights,
    distance,
    every_accumulator,
    fill,
    floats,
    oracle,
    output,
    saved_tensors,
    scalora_layers,
    train,
    with_weights,
)
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from peft.utils.save_and_load import set_peft_model_state_dict

from peft_scalora import ScaLoRAConfig

MIXED = ["Linear", "Conv1D", "Embedding", "Conv1d", "Conv2d", "Llama"]  # PEFT refuses mixed batches for attention


# Several adapters.


@every_kind
@every_accumulator
def test_training_one_adapter_leaves_the_other_alone(name, accumulator_rank):
    kind = KINDS[name]
    _, model = kind.filled(accumulator_rank=accumulator_rank)
    before = state_of(model, "default")
    model.add_adapter("other", kind.config(accumulator_rank=accumulator_rank))
    fill(model, "other", kind.inputs(), seed=7)
    after = state_of(model, "default")
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert torch.equal(after[key], value), key


@every_kind
@every_accumulator
def test_set_adapter_chooses_the_whole_change(name, accumulator_rank):
    base, model, x = two_adapters(name, accumulator_rank=accumulator_rank)
    for adapter in ("default", "other", "default"):
        model.set_adapter(adapter)
        assert distance(output(model, x), oracle(base, model, x, adapter=adapter)) < 1e-5
    assert distance(oracle(base, model, x), oracle(base, model, x, adapter="other")) > 0.05


@every_kind
def test_two_active_adapters_add_up(name):
    options = {"modules_to_save": None} if name == "BERT" else {}
    base, model, x = two_adapters(name, **options)
    model.base_model.set_adapter(["default", "other"])
    weights = {}
    for adapter in ("default", "other"):
        for key, value in dense_weights(base, saved_tensors(model, adapter), SCALE).items():
            weights[key] = weights.get(key, base.get_parameter(key).detach().double()) + value
            weights[key] -= base.get_parameter(key).detach().double()
    expected = with_weights(base, weights, x)
    assert distance(output(model, x), expected) < 1e-5
    model.merge_adapter(["default", "other"])
    assert distance(output(model, x), expected) < 1e-5


@pytest.mark.parametrize("name", MIXED)
@every_accumulator
def test_mixed_batch(name, accumulator_rank):
    """Every row is computed as with its own adapter, of whatever rank, or by the base model."""
    base, model, x = two_adapters(name, {"r": 3, "lora_alpha": 4}, accumulator_rank=accumulator_rank)
    names = ["other", "__base__", "default", "other", "default"][: len(x)]
    result = output(model, x, adapter_names=names)
    own = {
        "__base__": output(base, x).double(),
        "default": oracle(base, model, x),
        "other": oracle(base, model, x, adapter="other", scale=4 / 3),
    }
    for row, adapter in enumerate(names):
        assert distance(result[row], own[adapter][row]) < 1e-5, (row, adapter)


def test_mixed_batch_with_one_adapter_still_fresh():
    kind = KINDS["Linear"]
    base, model = kind.filled()
    model.add_adapter("fresh", kind.config())
    x = kind.inputs()
    result = output(model, x, adapter_names=["fresh", "default", "fresh", "default", "__base__"])
    expected = output(base, x).detach().double()
    expected[[1, 3]] = oracle(base, model, x).detach()[[1, 3]]
    assert distance(result, expected) < 1e-5


@every_kind
def test_delete_adapter(name):
    base, model, x = two_adapters(name)
    kept = state_of(model, "other")
    model.delete_adapter("default")
    assert not [key for key in model.state_dict() if ".default" in key]
    assert all("default" not in layer.scalora_config for layer in scalora_layers(model).values())
    model.set_adapter("other")
    assert distance(output(model, x), oracle(base, model, x, adapter="other")) < 1e-5
    for key, value in state_of(model, "other").items():
        assert torch.equal(value, kept[key]), key
    fill(model, "other", x)  # the hook is not confused by what is gone


def test_adapter_of_a_deleted_name_starts_fresh():
    base, model, x = two_adapters("Linear")
    model.set_adapter("other")
    model.delete_adapter("default")
    model.add_adapter("default", KINDS["Linear"].config())
    model.set_adapter("default")
    assert torch.equal(output(model, x), output(base, x))
    for layer in scalora_layers(model).values():
        assert not layer.scalora_U["default"].any()
        assert layer.progress("default").steps == layer.progress("default").columns == 0


def test_adapters_on_different_layers():
    base, model = KINDS["Linear"].filled(target_modules=["lin0"])
    model.add_adapter("other", KINDS["Linear"].config(target_modules=["lin1"]))
    fill(model, "other")
    x = floats(5, 14)
    for adapter in ("default", "other"):
        model.set_adapter(adapter)
        assert distance(output(model, x), oracle(base, model, x, adapter=adapter)) < 1e-5
    rows = output(model, x, adapter_names=["default", "other", "__base__", "default", "other"])
    assert distance(rows[1], oracle(base, model, x, adapter="other")[1]) < 1e-5
    assert distance(rows[3], oracle(base, model, x)[3]) < 1e-5


def test_status_reports():
    _, model, _ = two_adapters("Linear")
    status = model.get_model_status()
    assert (status.peft_types, status.num_adapter_layers) == ({"default": "SCALORA", "other": "SCALORA"}, 2)
    assert status.available_adapters == ["default", "other"]
    assert [layer.available_adapters for layer in model.get_layer_status()] == [["default", "other"]] * 2


def test_an_interval_longer_than_the_training_is_plain_lora_bit_for_bit():
    kind, results = KINDS["Llama"], []
    base = kind.build()
    for cls, options in ((ScaLoRAConfig, {"scaling_interval": 100}), (LoraConfig, {})):
        torch.manual_seed(6)
        model = get_peft_model(copy.deepcopy(base), cls(r=2, target_modules=kind.targets, lora_dropout=0.1, **options))
        train(model.train(), kind.inputs(), 4)
        results.append({k: v for k, v in state_of(model, "default").items() if "scalora" not in k})
    assert results[0].keys() == results[1].keys()
    for key, value in results[1].items():
        assert torch.equal(results[0][key], value), key


def test_low_level_injection():
    """Without a PeftModel around it, as diffusers adapts its models."""
    kind = KINDS["Linear"]
    base, wrapped = kind.filled()
    model = inject_adapter_in_model(kind.config(), copy.deepcopy(base))
    state = get_peft_model_state_dict(wrapped)
    set_peft_model_state_dict(model, {k.removeprefix("base_model.model."): v for k, v in state.items()})
    assert torch.equal(output(model, kind.inputs()), output(wrapped, kind.inputs()))
    before = [layer.progress("default").rescalings for layer in scalora_layers(model).values()]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    train(model, kind.inputs(), 2)
    assert [layer.progress("default").rescalings for layer in scalora_layers(model).values()] == [n + 2 for n in before]


def test_ddp_is_told_to_leave_the_accumulated_state_alone():
    _, model = KINDS["Linear"].filled()
    ignored = model._ddp_params_and_buffers_to_ignore
    assert set(ignored) == {name for name, _ in model.named_buffers()}
    assert len(ignored) == 2 * 5  # two layers, each with U, V, norms, scale and progress


# Copies.


@every_kind
@every_accumulator
def test_deepcopy_trains_on_its_own(name, accumulator_rank):
    """The copy's layers are found by the optimizer hook, the original's are left alone."""
    kind = KINDS[name]
    base, model = kind.filled(accumulator_rank=accumulator_rank)
    x, before = kind.inputs(), state_of(model, "default")
    twin = copy.deepcopy(model)
    assert torch.equal(output(twin, x), output(model, x))
    rescalings = [layer.progress("default").rescalings for layer in scalora_layers(twin).values()]
    train(twin, x, 3, seed=5)
    assert [layer.progress("default").rescalings for layer in scalora_layers(twin).values()] == [
        number + 3 for number in rescalings
    ]
    for key, value in state_of(model, "default").items():
        assert torch.equal(value, before[key]), key
    assert distance(output(twin, x), oracle(base, twin, x)) < 1e-5
    train(model, x, 3, seed=5)
    for key, value in state_of(model, "default").items():
        assert torch.allclose(value, twin.state_dict()[key], atol=1e-5), key


def test_pickled_models_in_another_process(tmp_path):
    """Layer classes are made on demand; a process that has made none finds them, and the hook finds the layers."""
    names = [name for name in KINDS if name not in ("GPT-2", "BERT")]
    for index, name in enumerate(names):
        _, model = KINDS[name].filled()
        torch.save(model, tmp_path / f"{index}.pt")
        torch.save((KINDS[name].inputs(), output(model, KINDS[name].inputs()).detach()), tmp_path / f"{index}.out")
    script = f"""
        import sys, torch
        sys.path.insert(0, {os.path.dirname(os.path.abspath(__file__))!r})
        from pathlib import Path
        from helpers_models import train, output, scalora_layers
        for index in range({len(names)}):
            model = torch.load(Path({str(tmp_path)!r}) / f"{{index}}.pt", weights_only=False)
            x, expected = torch.load(Path({str(tmp_path)!r}) / f"{{index}}.out")
            assert torch.allclose(output(model, x), expected, atol=1e-6), index
            before = [layer.progress("default").rescalings for layer in scalora_layers(model).values()]
            train(model, x, 2)
            after = [layer.progress("default").rescalings for layer in scalora_layers(model).values()]
            assert after == [number + 2 for number in before] and before, index
        print("all", index + 1)
    """
    assert run_python(script).stdout.split() == ["all", str(len(names))]
