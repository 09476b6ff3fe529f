"""Weighted sums of adapters by PEFT, and its conversion of an adapter to plain LoRA."""

import copy
import warnings

import peft
import pytest
import torch
from helpers_adapters import WEIGHTS, state_of, two_adapters
from helpers_models import (
    KINDS,
    SCALE,
    Linears,
    as_stored,
    change_of,
    distance,
    every_accumulator,
    fill,
    floats,
    oracle,
    output,
    saved_tensors,
    scalora_config,
    scalora_layers,
    train,
    with_weights,
)
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import merge_utils
from torch import nn

from peft_scalora import ScaLoRAConfig

# Conversion to plain LoRA by PEFT.


@pytest.mark.parametrize("name", ["Linear", "Conv1D", "Llama"])  # PEFT converts linear layers only
@every_accumulator
def test_save_as_lora_is_the_best_plain_lora(tmp_path, name, accumulator_rank):
    """At full rank the plain adapter computes the same; at a lower one it is the truncated SVD of the whole change."""
    options = {"target_modules": ["q_proj", "v_proj"]} if name == "Llama" else {}
    base, model = KINDS[name].filled(accumulator_rank=accumulator_rank, **options)
    x, tensors = KINDS[name].inputs(), saved_tensors(model)
    full = min(min(change_of(t, SCALE).shape) for t in tensors.values())
    for rank in (full, 3):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            peft.save_as_lora(tmp_path / str(rank), model, rank=rank)
            plain = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / str(rank)).eval()
        assert type(plain.peft_config["default"]) is LoraConfig
        weights = {}
        for layer, t in tensors.items():
            U, S, Vh = torch.linalg.svd(change_of(t, SCALE))
            change = (U[:, :rank] * S[:rank]) @ Vh[:rank]
            key, change = as_stored(change, base, layer)
            weights[key] = base.get_parameter(key).detach().double() + change
        assert distance(output(plain, x), with_weights(base, weights, x)) < 1e-4
        if rank == full:
            assert distance(output(plain, x), output(model, x)) < 1e-4


# Combining adapters.

MATRIX_KINDS = ["Linear", "Conv1D", "Embedding", "Conv2d", "Llama"]


def changes(model, adapter, scale=SCALE):
    return {layer: change_of(tensors, scale) for layer, tensors in saved_tensors(model, adapter).items()}


def weighted_sum(model, adapters, weights):
    parts = [changes(model, adapter) for adapter in adapters]
    return {layer: sum(w * part[layer] for w, part in zip(weights, parts)) for layer in parts[0]}


def accumulated(model, adapter):
    without = saved_tensors(model, adapter)
    for tensors in without.values():
        for key in ("lora_A", "lora_embedding_A"):
            if key in tensors:
                tensors[key].zero_()
    return {layer: change_of(tensors, 1.0) for layer, tensors in without.items()}


@pytest.mark.parametrize("name", [*MATRIX_KINDS, "Conv1d", "Conv3d"])
@every_accumulator
def test_cat_is_the_exact_weighted_sum(name, accumulator_rank):
    base, model, x = two_adapters(name, accumulator_rank=accumulator_rank)
    model.add_weighted_adapter(["default", "other"], WEIGHTS, "sum", combination_type="cat")
    expected = weighted_sum(model, ["default", "other"], WEIGHTS)
    for layer, change in changes(model, "sum", 1.0).items():
        assert distance(change, expected[layer]) < 1e-5
    model.set_adapter("sum")
    assert distance(output(model, x), oracle(base, model, x, adapter="sum", scale=1.0)) < 1e-4


@pytest.mark.parametrize("name", [*MATRIX_KINDS, "Conv1d", "MultiheadAttention"])
@pytest.mark.parametrize("weight", [0.7, -0.4])
@pytest.mark.parametrize("combination_type", ["linear", "cat", "svd", "ties", "dare_linear", "magnitude_prune"])
def test_one_adapter_times_a_weight(name, weight, combination_type):
    """PEFT takes "linear" whatever type is asked for, and that is exact for one adapter."""
    _, model = KINDS[name].filled()
    expected = weighted_sum(model, ["default"], [weight])
    model.add_weighted_adapter(["default"], [weight], "scaled", combination_type=combination_type)
    for layer, change in changes(model, "scaled", 1.0).items():
        assert distance(change, expected[layer]) < 1e-5


@pytest.mark.parametrize("name", MATRIX_KINDS)
@every_accumulator
def test_linear_adds_the_accumulated_changes(name, accumulator_rank):
    """The factors are combined as PEFT combines plain LoRA's; U V by the weighted sum of the U V."""
    _, model, _ = two_adapters(name, accumulator_rank=accumulator_rank)
    model.add_weighted_adapter(["default", "other"], WEIGHTS, "sum", combination_type="linear")
    parts = [accumulated(model, adapter) for adapter in ("default", "other")]
    for layer, change in accumulated(model, "sum").items():
        assert distance(change, WEIGHTS[0] * parts[0][layer] + WEIGHTS[1] * parts[1][layer]) < 1e-5
    tensors = [saved_tensors(model, adapter) for adapter in ("default", "other", "sum")]
    roots = [(abs(w * SCALE) ** 0.5, 1 if w > 0 else -1) for w in WEIGHTS]
    for layer in tensors[0]:
        for key in tensors[0][layer]:
            if not key.startswith("lora_"):
                continue
            first, second, combined = (t[layer][key] for t in tensors)
            signs = [sign if key.endswith("A") else 1 for _, sign in roots]
            assert distance(combined, roots[0][0] * signs[0] * first + roots[1][0] * signs[1] * second) < 1e-5


@pytest.mark.parametrize("name", MATRIX_KINDS)
@every_accumulator
def test_svd_is_the_best_approximation_of_the_weighted_sum(name, accumulator_rank):
    _, model, _ = two_adapters(name, accumulator_rank=accumulator_rank)
    expected = weighted_sum(model, ["default", "other"], WEIGHTS)
    model.add_weighted_adapter(["default", "other"], WEIGHTS, "sum", combination_type="svd", svd_rank=4)
    for layer, change in changes(model, "sum", 1.0).items():
        U, S, Vh = torch.linalg.svd(expected[layer], full_matrices=False)
        assert distance(change, (U[:, :4] * S[:4]) @ Vh[:4]) < 1e-4
    assert all(not value.any() for value in accumulated(model, "sum").values())


@pytest.mark.parametrize("combination_type", ["ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd"])
@pytest.mark.parametrize("density", [1.0, 0.5])
def test_svd_types_combine_the_whole_changes(combination_type, density):
    """Oracle: PEFT's own combination of the dense changes, then the truncated SVD."""
    _, model, _ = two_adapters("Linear")
    parts = [changes(model, adapter) for adapter in ("default", "other")]
    torch.manual_seed(11)
    model.add_weighted_adapter(
        ["default", "other"], WEIGHTS, "sum", combination_type=combination_type, density=density, svd_rank=6
    )
    combined, result = {}, changes(model, "sum", 1.0)
    torch.manual_seed(11)
    for layer in scalora_layers(model.base_model.model):
        combine = getattr(merge_utils, combination_type.removesuffix("_svd"))
        deltas = [part[layer].float() for part in parts]
        # The adapter's own initialisation draws random numbers before the combination does.
        combined[layer] = combine(deltas, torch.tensor(WEIGHTS), density)
        U, S, Vh = torch.linalg.svd(combined[layer].double(), full_matrices=False)
        combined[layer] = (U[:, :6] * S[:6]) @ Vh[:6]
    if "dare" in combination_type and density < 1:
        # Dropped entries differ from call to call: only the size of the outcome can be compared.
        for layer, change in result.items():
            assert 0.3 < change.norm() / combined[layer].norm() < 3
    else:
        for layer, change in result.items():
            assert distance(change, combined[layer]) < 1e-4


@pytest.mark.parametrize("combination_type", ["ties", "dare_linear", "dare_ties", "magnitude_prune"])
def test_types_that_compare_entries_of_factors_are_refused_by_name(combination_type):
    base, model, x = two_adapters("Linear")
    with pytest.raises(ValueError, match=rf"{combination_type}'.*rescaled.*'{combination_type}_svd'"):
        model.add_weighted_adapter(["default", "other"], WEIGHTS, "sum", combination_type=combination_type, density=0.5)
    assert list(model.peft_config) == ["default", "other"]
    assert not [key for key in model.state_dict() if ".sum" in key]
    assert distance(output(model, x), oracle(base, model, x)) < 1e-5


@pytest.mark.parametrize("combination_type", ["ties", "dare_linear", "dare_ties", "magnitude_prune", "linear", "cat"])
def test_adapters_without_accumulated_change_combine_like_plain_lora(combination_type):
    results = []
    for config_class in (ScaLoRAConfig, LoraConfig):
        torch.manual_seed(4)
        options = {"r": 2, "target_modules": ["lin0", "lin1"], "init_lora_weights": False}
        model = get_peft_model(Linears(), config_class(**options))
        model.add_adapter("other", config_class(**options))
        torch.manual_seed(5)
        model.add_weighted_adapter(["default", "other"], WEIGHTS, "sum", combination_type=combination_type, density=0.6)
        results.append({k: v for k, v in state_of(model, "sum").items() if "scalora" not in k})
    assert results[0].keys() == results[1].keys()
    for key, value in results[0].items():
        assert torch.equal(value, results[1][key]), key


def test_unknown_combinations_are_refused_as_by_peft():
    _, model, _ = two_adapters("Linear")
    with pytest.raises(ValueError, match="Invalid combination_type: mean"):
        model.add_weighted_adapter(["default", "other"], WEIGHTS, "sum", combination_type="mean")
    with pytest.raises(ValueError, match="Adapter missing does not exist"):
        model.add_weighted_adapter(["default", "missing"], WEIGHTS, "sum")


@every_accumulator
def test_combining_adapters_at_a_changed_scale(accumulator_rank):
    """set_scale acts on the whole change of a part, as everywhere."""
    _, model, _ = two_adapters("Linear", accumulator_rank=accumulator_rank)
    for layer in scalora_layers(model).values():
        layer.set_scale("other", 0.5)
    model.add_weighted_adapter(["default", "other"], WEIGHTS, "sum", combination_type="cat")
    expected = weighted_sum(model, ["default", "other"], [WEIGHTS[0], 0.5 * WEIGHTS[1]])
    for layer, change in changes(model, "sum", 1.0).items():
        assert distance(change, expected[layer]) < 1e-5


COMBINATIONS = {
    "different accumulator ranks": ({}, {"accumulator_rank": 3}),
    "different ranks": ({}, {"r": 4, "lora_alpha": 6}),
    "different layers": ({"target_modules": ["lin0"]}, {"target_modules": ["lin1"]}),
    "one layer in common": ({"target_modules": ["lin0"]}, {}),
    "one of them lossless": ({"accumulator_rank": 64}, {}),
    "default accumulator rank": ({"accumulator_rank": None}, {"accumulator_rank": None}),
    "rank pattern": ({"rank_pattern": {"lin0": 4}, "alpha_pattern": {"lin0": 6}}, {}),
}


@pytest.mark.parametrize("combination", COMBINATIONS.values(), ids=COMBINATIONS)
@pytest.mark.parametrize("combination_type", ["cat", "svd"])
def test_combined_adapter_is_exact_and_can_be_saved_and_loaded(tmp_path, combination, combination_type):
    kind = KINDS["Linear"]
    base, model = kind.filled(**combination[0])
    model.add_adapter("other", kind.config(**combination[1]))
    fill(model, "other", kind.inputs(), seed=7)
    parts = [changes(model, adapter) for adapter in ("default", "other")]
    model.add_weighted_adapter(["default", "other"], WEIGHTS, "sum", combination_type=combination_type, svd_rank=8)
    for layer, change in changes(model, "sum", 1.0).items():
        expected = sum(w * part[layer] for w, part in zip(WEIGHTS, parts) if layer in part)
        if combination_type == "svd":
            U, S, Vh = torch.linalg.svd(expected, full_matrices=False)
            expected = (U[:, :8] * S[:8]) @ Vh[:8]
        assert distance(change, expected) < 1e-4, layer
    model.set_adapter("sum")
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "sum").eval()
    assert distance(output(loaded, kind.inputs()), output(model, kind.inputs())) < 1e-6


def test_combining_with_an_adapter_that_has_no_scalora_layer():
    """Grouped convolutions are plain LoRA: an adapter may consist of nothing else."""
    base = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 3)).eval()
    x = floats(5, 4, 7, 7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(copy.deepcopy(base), scalora_config(target_modules=["1"]))
        fill(model, inputs=x)
        model.add_adapter("grouped", scalora_config(target_modules=["0"]))
    expected = 0.7 * changes(model, "default")["1"]
    model.add_weighted_adapter(["default", "grouped"], WEIGHTS, "sum", combination_type="cat")
    assert distance(change_of(saved_tensors(model, "sum")["1"], 1.0), expected) < 1e-5


def test_combined_adapter_trains_on():
    base, model, x = two_adapters("Linear")
    model.add_weighted_adapter(["default", "other"], WEIGHTS, "sum", combination_type="cat")
    kept = state_of(model, "default")
    model.set_adapter("sum")
    before = [layer.progress("sum").rescalings for layer in scalora_layers(model).values()]
    train(model, x, 3)
    assert [layer.progress("sum").rescalings for layer in scalora_layers(model).values()] == [n + 3 for n in before]
    assert distance(output(model, x), oracle(base, model, x, adapter="sum", scale=1.0)) < 1e-4
    for key, value in state_of(model, "default").items():
        assert torch.equal(value, kept[key]), key


def test_combined_adapter_with_rslora_is_what_plain_peft_gives_plus_the_accumulated_sum():
    base, model, _ = two_adapters("Linear", use_rslora=True)
    plain = get_peft_model(
        copy.deepcopy(base), LoraConfig(r=2, lora_alpha=3, use_rslora=True, target_modules=["lin0", "lin1"])
    )
    plain.add_adapter("other", LoraConfig(r=2, lora_alpha=3, use_rslora=True, target_modules=["lin0", "lin1"]))
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "scalora" not in k})
    for m in (plain, model):
        m.add_weighted_adapter(["default", "other"], WEIGHTS, "sum", combination_type="cat")
    parts = [accumulated(model, adapter) for adapter in ("default", "other")]
    for name in ("lin0", "lin1"):
        expected = plain.base_model.model.get_submodule(name).get_delta_weight("sum").double()
        expected = expected + WEIGHTS[0] * parts[0][name] + WEIGHTS[1] * parts[1][name]
        assert distance(model.base_model.model.get_submodule(name).get_delta_weight("sum"), expected) < 1e-5
