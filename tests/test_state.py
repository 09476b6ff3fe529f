"""A layer's tensors come and go together: saved from a part of them, loaded in part, put back, cast and averaged."""

import copy
import warnings

import pytest
import torch
from accelerate import Accelerator
from helpers_models import KINDS, distance, every_layer_kind, fill, output, scalora_layers, train
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from peft_scalora import ScaLoRAConfig, export_lora
from peft_scalora.export.info import adapter_info
from peft_scalora.export.lora import export_folder

every_name = pytest.mark.parametrize("name", ["Linear", "Conv1D", "Embedding", "Conv2d", "MultiheadAttention", "BERT"])


def factors_of(model):
    """Return what public training scripts keep: the parameters that have lora_ in their names."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}


def loaded(base, folder, **kwargs):
    return PeftModel.from_pretrained(copy.deepcopy(base), folder, **kwargs).eval()


# Saving.


@every_name
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saving_the_trained_parameters_alone_saves_the_adapter(tmp_path, name, dtype):
    kind = KINDS[name]
    base, model = kind.filled()
    state = {name: p.to(dtype) for name, p in factors_of(model).items()}
    state |= {n: p for n, p in model.named_parameters() if "modules_to_save" in n}
    model.save_pretrained(tmp_path, state_dict=state)
    whole, part = get_peft_model_state_dict(model), load_file(tmp_path / "adapter_model.safetensors")
    assert {key for key in whole if "scalora_" in key} <= part.keys()
    assert all(torch.equal(whole[key], part[key]) for key in whole if "scalora_" in key)
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    assert distance(output(loaded(base, tmp_path), kind.inputs()), output(model, kind.inputs())) < tolerance


def test_saving_a_state_that_engines_left_buffers_out_of(tmp_path):
    base, model = KINDS["Linear"].filled()
    state = {key: tensor for key, tensor in model.state_dict().items() if "scalora_progress" not in key}
    model.save_pretrained(tmp_path, state_dict=state)
    assert (
        distance(output(loaded(base, tmp_path), KINDS["Linear"].inputs()), output(model, KINDS["Linear"].inputs()))
        < 1e-6
    )


def test_saving_factors_of_another_time_is_refused(tmp_path):
    """A whole state dict of that time is saved as it is."""
    base, model = KINDS["Linear"].filled()
    x = KINDS["Linear"].inputs()
    before, factors, whole = output(model, x), factors_of(model), copy.deepcopy(model.state_dict())
    train(model, x, 3)
    with pytest.raises(ValueError, match=r"lin0 without the change accumulated beside them.*whole model.state_dict"):
        model.save_pretrained(tmp_path / "mixed", state_dict=factors)
    model.save_pretrained(tmp_path / "whole", state_dict=whole)
    assert distance(output(loaded(base, tmp_path / "whole"), x), before) < 1e-6


def test_a_folder_that_lost_its_accumulated_change_is_refused_by_name(tmp_path):
    base, model = KINDS["Linear"].filled()
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({key: tensor for key, tensor in load_file(file).items() if "scalora_" not in key}, file)
    readers = [
        lambda: loaded(base, tmp_path),
        lambda: export_folder(str(tmp_path), str(tmp_path / "out")),
        lambda: adapter_info(str(tmp_path)),
    ]
    for read in readers:
        with pytest.raises(ValueError, match=r"lin[01] without the change.*scalora_U, scalora_V.*save_pretrained"):
            read()


# Loading.


@pytest.mark.parametrize("changed", [{"r": 3}, {"accumulator_rank": 4}, {"r": 4, "accumulator_rank": 3}])
def test_layers_of_another_size_are_left_as_they_are(tmp_path, changed):
    kind = KINDS["Linear"]
    base, model = kind.filled()
    state = get_peft_model_state_dict(model)
    other = fill(get_peft_model(copy.deepcopy(base), kind.config(**changed)), seed=5)
    before = get_peft_model_state_dict(other)
    before = {key: tensor.clone() for key, tensor in before.items()}
    with pytest.warns(UserWarning, match=r"2 layers have tensors of another shape .*lin0 for one"):
        set_peft_model_state_dict(other, state, ignore_mismatched_sizes=True)
    for key, tensor in get_peft_model_state_dict(other).items():
        assert torch.equal(tensor, before[key]), key
    other.save_pretrained(tmp_path)
    assert distance(output(loaded(base, tmp_path), kind.inputs()), output(other, kind.inputs())) < 1e-6
    with pytest.warns(UserWarning, match="another shape"), pytest.raises(RuntimeError, match="size mismatch"):
        set_peft_model_state_dict(other, state)


def test_layers_that_fit_are_loaded_beside_one_that_does_not():
    kind = KINDS["Linear"]
    base, model = kind.filled()
    other = fill(get_peft_model(copy.deepcopy(base), kind.config(rank_pattern={"lin1": 4})), seed=5)
    before = {key: tensor.clone() for key, tensor in get_peft_model_state_dict(other).items()}
    given = get_peft_model_state_dict(model)
    with pytest.warns(UserWarning, match=r"1 layers have tensors of another shape .*lin1 for one"):
        set_peft_model_state_dict(other, given, ignore_mismatched_sizes=True)
    for key, tensor in get_peft_model_state_dict(other).items():
        assert torch.equal(tensor, before[key] if "lin1" in key else given[key]), key


def test_factors_alone_are_not_loaded_under_an_accumulated_change():
    kind = KINDS["Linear"]
    _, model = kind.filled()
    before = output(model, kind.inputs())
    state = {key: 2 * tensor for key, tensor in get_peft_model_state_dict(model).items() if "scalora_" not in key}
    with pytest.raises(ValueError, match=r"'default' has the factors of .*lin0 without the change accumulated"):
        set_peft_model_state_dict(model, state)
    assert distance(output(model, kind.inputs()), before) < 1e-6


def test_one_layer_without_its_accumulated_change_is_refused():
    kind = KINDS["Linear"]
    base, model = kind.filled()
    state = get_peft_model_state_dict(model)
    state = {key: tensor for key, tensor in state.items() if not ("lin1" in key and "scalora_" in key)}
    with pytest.raises(ValueError, match=r"factors of .*lin1 without the change accumulated"):
        set_peft_model_state_dict(get_peft_model(copy.deepcopy(base), kind.config()), state)


@every_name
def test_putting_back_factors_by_load_state_dict_is_reported(name):
    _, model = KINDS[name].filled()
    best = factors_of(model)
    with pytest.warns(UserWarning, match="factors of adapter 'default' are loaded without the change accumulated"):
        model.load_state_dict(best, strict=False)
    whole = copy.deepcopy(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_state_dict(whole)


# Counts.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.float64])
def test_counts_may_have_any_type(tmp_path, dtype):
    kind = KINDS["Linear"]
    base, model = kind.filled()
    state = {key: tensor.to(dtype) if "progress" in key else tensor for key, tensor in model.state_dict().items()}
    twin = get_peft_model(copy.deepcopy(base), kind.config()).eval()
    twin.load_state_dict(state)
    model.save_pretrained(tmp_path, state_dict=state)
    for each in (twin, loaded(base, tmp_path)):
        assert distance(output(each, kind.inputs()), output(model, kind.inputs())) < 1e-6
        for layer, other in zip(scalora_layers(each).values(), scalora_layers(model).values()):
            assert layer.progress("default").numbers == other.progress("default").numbers
    export_folder(str(tmp_path), str(tmp_path / "plain"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_state_dict_in_half_precision_loads(tmp_path, dtype):
    kind = KINDS["Linear"]
    base, model = kind.filled()
    state = {key: tensor.to(dtype) for key, tensor in get_peft_model_state_dict(model).items()}
    twin = get_peft_model(copy.deepcopy(base), kind.config()).eval()
    set_peft_model_state_dict(twin, state)
    assert distance(output(twin, kind.inputs()), output(model, kind.inputs())) < 5e-2
    assert all(layer.accumulator("default").columns == 5 for layer in scalora_layers(twin).values())


def test_rounded_counts_lose_no_column():
    """bfloat16 knows 256 and 258, but not 257."""
    base = torch.nn.Sequential(torch.nn.Linear(300, 300))
    config = ScaLoRAConfig(r=1, target_modules=["0"], accumulator_rank=300)
    model = get_peft_model(copy.deepcopy(base), config).eval()
    (layer,) = scalora_layers(model).values()
    accumulator = layer.accumulator("default")
    accumulator.replace([accumulator], torch.randn(1, 300, 257), torch.randn(1, 257, 300))
    state = {key: t.to(torch.bfloat16) if "progress" in key else t for key, t in model.state_dict().items()}
    twin = get_peft_model(copy.deepcopy(base), copy.deepcopy(config)).eval()
    twin.load_state_dict(state)
    x = torch.randn(3, 300)
    assert distance(output(twin, x), output(model, x)) < 1e-6


def test_averages_of_adapters_with_equal_counts_load():
    kind = KINDS["Linear"]
    base, first = kind.filled()
    second = fill(get_peft_model(copy.deepcopy(base), kind.config()), seed=5)
    states = [get_peft_model_state_dict(model) for model in (first, second)]
    average = {key: sum(state[key].float() for state in states) / 2 for key in states[0]}
    set_peft_model_state_dict(first, average)
    assert all(layer.progress("default").numbers[:2] == [6, 6] for layer in scalora_layers(first).values())
    train(second, kind.inputs(), 1)
    states = [get_peft_model_state_dict(model) for model in (first, second)]
    average = {key: sum(state[key].float() for state in states) / 2 for key in states[0]}
    with pytest.raises(ValueError, match=r"progress.weight=\[6.5, 6.5, .*whole numbers.*add_weighted_adapter"):
        set_peft_model_state_dict(first, average)


# Other hands.


@every_layer_kind
@pytest.mark.parametrize("accumulator_rank", [1, 64])
def test_no_tensor_of_a_state_dict_is_empty_or_shares_storage_with_another(kind, accumulator_rank):
    """accelerate leaves out all but one of the tensors that share a storage pointer, as empty ones do."""
    _, model = kind.filled(accumulator_rank=accumulator_rank)
    own = {key: tensor for key, tensor in model.state_dict().items() if "lora_" in key}
    assert all(tensor.numel() for tensor in own.values())
    assert len({tensor.untyped_storage().data_ptr() for tensor in own.values()}) == len(own)


@pytest.mark.parametrize("name", ["Linear", "Conv2d", "BERT"])
def test_accelerate_saves_and_loads_the_whole_state(tmp_path, name):
    kind = KINDS[name]
    _, model = kind.filled(accumulator_rank=64)
    expected = output(model, kind.inputs())
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(model)
    accelerator.save_state(str(tmp_path))
    train(model, kind.inputs(), 2)
    accelerator.load_state(str(tmp_path))
    assert distance(output(model.eval(), kind.inputs()), expected) < 1e-6
    assert all(layer.progress("default").steps == 6 for layer in scalora_layers(model).values())


def test_an_exported_state_of_averaged_counts_says_what_is_wrong(tmp_path):
    _, model = KINDS["Linear"].filled()
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({k: t + 0.5 if "progress" in k else t for k, t in load_file(file).items()}, file)
    with pytest.raises(ValueError, match="whole numbers"):
        export_folder(str(tmp_path), str(tmp_path / "plain"))
    export_lora(model, tmp_path / "plain")
