"""Another lora_alpha, use_rslora or alpha_pattern scales the whole change, as it does for LoRA, wherever it is read.

The oracle is s' (B A + U V / s) added to the base weight in float64, with the s at which U V was folded.
"""

import copy
import json

import pytest
import torch
from helpers_models import (
    KINDS,
    SCALE,
    as_stored,
    distance,
    fill,
    output,
    saved_tensors,
    scalora_config,
    scalora_layers,
    train,
    with_weights,
)
from peft import PeftConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

from peft_scalora import export_lora
from peft_scalora.export.info import adapter_info
from peft_scalora.export.lora import export_folder

EDITS = {
    "lora_alpha": ({"lora_alpha": 8}, {"lin0": 4.0, "lin1": 4.0}),
    "lora_alpha=0": ({"lora_alpha": 0}, {"lin0": 0.0, "lin1": 0.0}),
    "lora_alpha<0": ({"lora_alpha": -2}, {"lin0": -1.0, "lin1": -1.0}),
    "use_rslora": ({"use_rslora": True}, {"lin0": 3 / 2**0.5, "lin1": 3 / 2**0.5}),
    "alpha_pattern": ({"alpha_pattern": {"lin0": 5}}, {"lin0": 2.5, "lin1": SCALE}),
}
every_edit = pytest.mark.parametrize(("edit", "scales"), EDITS.values(), ids=EDITS)
KIND = KINDS["Linear"]
X = KIND.inputs()


def changes(model, scales):
    """Return s' (B A + U V / s) of every layer in float64."""
    found = {}
    for layer, tensors in saved_tensors(model).items():
        accumulated = tensors["scalora_U"] @ tensors["scalora_V"]
        assert accumulated.norm() > 1e-2
        found[layer] = scales[layer] * (tensors["lora_B"] @ tensors["lora_A"] + accumulated / SCALE)
    return found


def expected_output(base, model, scales):
    weights = {}
    for layer, change in changes(model, scales).items():
        name, change = as_stored(change, base, layer)
        weights[name] = base.get_parameter(name).detach().double() + change
    return with_weights(base, weights, X)


def edited(tmp_path, model, edit):
    """Save the adapter and edit its configuration's file."""
    model.save_pretrained(tmp_path / "saved")
    file = tmp_path / "saved" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | edit))
    return tmp_path / "saved"


def loaded(base, folder, **kwargs):
    return PeftModel.from_pretrained(copy.deepcopy(base), folder, **kwargs).eval()


def through_config(base, folder):
    return loaded(base, folder, config=PeftConfig.from_pretrained(folder))


def hotswapped(base, folder):
    other = get_peft_model(copy.deepcopy(base), PeftConfig.from_pretrained(folder))
    hotswap_adapter(other, str(folder), adapter_name="default", torch_device="cpu")
    return other.eval()


def exported(base, folder):
    export_folder(str(folder), str(folder.parent / "plain"))
    return loaded(base, folder.parent / "plain")


def exported_from_memory(base, folder):
    export_lora(loaded(base, folder), folder.parent / "plain")
    return loaded(base, folder.parent / "plain")


def saved_again(base, folder):
    loaded(base, folder).save_pretrained(folder.parent / "again")
    return loaded(base, folder.parent / "again")


def merged(base, folder):
    return loaded(base, folder).merge_and_unload()


def of_a_whole_state_dict(base, folder):
    model = get_peft_model(copy.deepcopy(base), PeftConfig.from_pretrained(folder))
    model.load_state_dict(loaded(base, folder).state_dict())
    return model.eval()


READERS = (
    loaded, through_config, hotswapped, exported, exported_from_memory, saved_again, merged, of_a_whole_state_dict
)  # fmt: skip


@every_edit
@pytest.mark.parametrize("read", READERS, ids=lambda read: read.__name__)
def test_the_whole_change_scales(tmp_path, edit, scales, read):
    base, model = KIND.filled()
    folder = edited(tmp_path, model, edit)
    result = read(base, folder)
    if read is hotswapped and "alpha_pattern" in edit:  # which PEFT does not find when it swaps
        scales = dict.fromkeys(scales, SCALE)
    expected = expected_output(base, model, scales)
    assert distance(output(result, X), expected) < 1e-5
    assert distance(output(base, X), expected) > (0.03 if any(scales.values()) else -1)


@every_edit
def test_info_gives_the_norm_of_the_scaled_change(tmp_path, edit, scales):
    _, model = KIND.filled()
    layers = adapter_info(str(edited(tmp_path, model, edit)))["layers"]
    for layer, change in changes(model, scales).items():
        assert layers[layer]["norm"] == pytest.approx(float(change.norm()), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("lora_alpha", [8, 0])
def test_hotswapping_takes_the_scale_of_what_comes_in(tmp_path, lora_alpha):
    """From another lora_alpha than that of the file, and into a compiled model."""
    base, model = KIND.filled()
    folder = edited(tmp_path, model, {"lora_alpha": lora_alpha})
    expected = expected_output(base, model, dict.fromkeys(("lin0", "lin1"), lora_alpha / 2))
    swapped = fill(get_peft_model(copy.deepcopy(base), KIND.config(lora_alpha=5)), seed=9)
    hotswap_adapter(swapped, str(folder), adapter_name="default", torch_device="cpu")
    assert distance(output(swapped, X), expected) < 1e-5
    compiled = fill(get_peft_model(copy.deepcopy(base), KIND.config(lora_alpha=5, accumulator="factored")), seed=9)
    prepare_model_for_compiled_hotswap(compiled)
    torch._dynamo.reset()
    compiled = torch.compile(compiled, backend="eager", fullgraph=True)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        assert distance(output(compiled, X), expected) > 1e-2
        hotswap_adapter(compiled, str(folder), adapter_name="default", torch_device="cpu")
        assert distance(output(compiled, X), expected) < 1e-5
    torch._dynamo.reset()


def test_training_goes_on_at_another_scale(tmp_path):
    """What is folded keeps the scale of the accumulated change: one rescaling leaves the function as it is."""
    base, model = KIND.filled()
    folder = edited(tmp_path, model, {"lora_alpha": 8})
    twin = loaded(base, folder, is_trainable=True)
    train(twin, X, 6)
    assert all(layer.progress("default").rescalings == 12 for layer in scalora_layers(twin).values())
    expected = expected_output(base, twin, dict.fromkeys(("lin0", "lin1"), 4.0))
    assert distance(output(twin, X), expected) < 1e-5
    twin.save_pretrained(tmp_path / "again")
    assert distance(output(loaded(base, tmp_path / "again"), X), expected) < 1e-5


def test_an_adapter_of_scale_zero_can_be_turned_on(tmp_path):
    base = KIND.build().eval()
    model = get_peft_model(copy.deepcopy(base), scalora_config(target_modules=["lin0", "lin1"], lora_alpha=0))
    train(model, X, 3)
    folder = edited(tmp_path, model, {"lora_alpha": 3})
    assert torch.isfinite(output(loaded(base, folder), X)).all()
    assert distance(output(model, X), output(base, X)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_scale_rounded_with_the_state_dict_is_as_configured(dtype):
    base, model = KIND.filled(r=3, use_rslora=True)
    state = {k: tensor.to(dtype) if tensor.is_floating_point() else tensor for k, tensor in model.state_dict().items()}
    twin = get_peft_model(copy.deepcopy(base), KIND.config(r=3, use_rslora=True))
    twin.load_state_dict(state)
    assert all(layer.accumulator("default").scale == 1.0 for layer in scalora_layers(twin).values())
