"""Saving and loading adapters, and the files of a saved one."""

import contextlib
import copy
import json
import os
import re
import warnings

import pytest
import torch
from helpers_adapters import every_kind, run_python, save, saved_pair, state_of
from helpers_models import (
    KINDS,
    check_filled,
    distance,
    every_accumulator,
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
)
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils.save_and_load import load_peft_weights, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from peft_scalora import ScaLoRAConfig
from peft_scalora.files import fingerprint
from peft_scalora.version import install_command

# Saving and loading.


@every_kind
@every_accumulator
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_save_and_load_is_exact(tmp_path, name, accumulator_rank, low_cpu_mem_usage):
    base, model = KINDS[name].filled(accumulator_rank=accumulator_rank)
    x = KINDS[name].inputs()
    if name == "MultiheadAttention":  # its base weights drift as PEFT merges and unmerges them
        base = copy.deepcopy(model).unload()
    save(model, tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*")
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    expected = state_of(model, "default")
    assert state_of(loaded, "default").keys() == expected.keys()
    for key, value in state_of(loaded, "default").items():
        assert torch.equal(value, expected[key]), key
        assert value.dtype == expected[key].dtype
    assert distance(output(loaded, x), output(model, x)) < 1e-6
    if name != "MultiheadAttention":
        assert torch.equal(output(loaded, x), output(model, x))
    loaded.set_adapter("default")
    for parameter in loaded.parameters():
        parameter.requires_grad_(False)
    for layer in scalora_layers(loaded).values():
        for factor in layer.factors("default"):
            factor.requires_grad_(True)
    train(loaded.train(), x, 2)
    assert all(layer.progress("default").steps == 8 for layer in scalora_layers(loaded).values())


@every_kind
@every_accumulator
def test_saved_file_holds_the_adapter_and_nothing_else(tmp_path, name, accumulator_rank):
    _, model = KINDS[name].filled(accumulator_rank=accumulator_rank)
    save(model, tmp_path, save_embedding_layers=False)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    for layer, expected in saved_tensors(model).items():
        parts = [key for key in tensors if key.replace(".base_layer", "").startswith(f"base_model.model.{layer}.")]
        parts = {key.replace(".base_layer", "").removeprefix(f"base_model.model.{layer}.") for key in parts}
        parts = {part.removesuffix(".weight") for part in parts if part.count(".") < 2 and "proj" not in part}
        assert {"scalora_U", "scalora_V", "scalora_scale", "scalora_norms", "scalora_progress"} <= parts
        assert len(expected) == 7
    floating = {k: v for k, v in tensors.items() if "scalora_U" in k or "scalora_V" in k}
    assert all(value.dtype == torch.float32 for value in floating.values())
    assert all("lora_" in key or "classifier" in key for key in tensors)


@pytest.mark.parametrize("name", ["Linear", "Embedding", "Llama", "BERT"])
@every_accumulator
def test_save_load_save_gives_the_same_bytes(tmp_path, name, accumulator_rank):
    base, model = KINDS[name].filled(accumulator_rank=accumulator_rank)
    save(model, tmp_path / "first")
    save(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "first"), tmp_path / "second")
    files = {"adapter_model.safetensors", "adapter_config.json", "README.md"}
    assert set(os.listdir(tmp_path / "first")) == files
    first = {file: (tmp_path / "first" / file).read_bytes() for file in files}
    assert {file: (tmp_path / "second" / file).read_bytes() for file in files} == first
    save(model, tmp_path / "first")
    again = {file: (tmp_path / "first" / file).read_bytes() for file in files}
    assert again == first, "a second save into the same folder"


def test_pickled_adapters_are_converted_before_they_are_loaded(tmp_path):
    base, model = KINDS["Linear"].filled()
    save(model, tmp_path, safe_serialization=False)
    with pytest.raises(ValueError, match=r"does not support adapter_model\.bin.*weights_only=True") as refusal:
        PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    (remedy,) = re.findall(r"safetensors\.torch\.(save_file\(.*\))", str(refusal.value))
    with contextlib.chdir(tmp_path):
        exec(remedy, {"save_file": save_file, "torch": torch})
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert torch.equal(output(loaded, floats(5, 14)), output(model, floats(5, 14)))


def test_adapter_names(tmp_path):
    """Any name on saving and on loading, and several adapters in one folder."""
    kind = KINDS["Linear"]
    base = kind.build().eval()
    model = fill(get_peft_model(copy.deepcopy(base), kind.config(), adapter_name="my adapter"), "my adapter")
    model.add_adapter("second one", kind.config(accumulator_rank=3))
    fill(model, "second one", seed=9)
    save(model, tmp_path)
    x = kind.inputs()
    for name in ("my adapter", "second one"):
        assert {"adapter_model.safetensors", "adapter_config.json", "README.md"} <= set(os.listdir(tmp_path / name))
        model.set_adapter(name)
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / name, adapter_name="renamed").eval()
        assert torch.equal(output(loaded, x), output(model, x))
    loaded.load_adapter(tmp_path / "my adapter", adapter_name="second")
    loaded.set_adapter("second")
    model.set_adapter("my adapter")
    assert torch.equal(output(loaded, x), output(model, x))


@pytest.mark.parametrize("name", ["scalora_U", "weight", "default_2", "lin0", "U"])
def test_odd_adapter_names(tmp_path, name):
    kind = KINDS["Linear"]
    base = kind.build().eval()
    model = fill(get_peft_model(copy.deepcopy(base), kind.config(), adapter_name=name), name)
    save(model, tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / name, adapter_name=name).eval()
    assert torch.equal(output(loaded, kind.inputs()), output(model, kind.inputs()))


def test_state_dict_of_the_whole_model():
    base, model = KINDS["Linear"].filled()
    twin = get_peft_model(copy.deepcopy(base), KINDS["Linear"].config())
    twin.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(output(twin.eval(), floats(5, 14)), output(model, floats(5, 14)))


@pytest.mark.parametrize("name", ["Linear", "Embedding", "Conv2d", "MultiheadAttention"])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_plain_lora_adapter_as_a_start(tmp_path, name, low_cpu_mem_usage):
    """A plain adapter loaded as a ScaLoRA one computes the same, and is rescaled from then on."""
    kind = KINDS[name]
    base = kind.build().eval()
    options = {"r": 2, "lora_alpha": 3, "target_modules": kind.targets}
    plain = get_peft_model(copy.deepcopy(base), LoraConfig(**options)).eval()
    train(plain, kind.inputs(), 3)
    save(plain, tmp_path)
    if name == "MultiheadAttention":  # its base weights drift as PEFT merges and unmerges them
        base = copy.deepcopy(plain).unload()
    model = PeftModel.from_pretrained(
        copy.deepcopy(base), tmp_path, config=scalora_config(**options), is_trainable=True,
        low_cpu_mem_usage=low_cpu_mem_usage,
    ).eval()  # fmt: skip
    assert distance(output(model, kind.inputs()), output(plain, kind.inputs())) < 1e-5
    fill(model, inputs=kind.inputs())
    assert distance(output(model, kind.inputs()), oracle(base, model, kind.inputs())) < 1e-5


def test_loading_over_an_adapter_replaces_its_state(tmp_path):
    base, _, second, x = saved_pair(tmp_path)
    model = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "first").eval()
    set_peft_model_state_dict(model, load_peft_weights(tmp_path / "second", device="cpu"))
    assert torch.equal(output(model, x), output(second, x))


def test_loading_an_accumulator_of_another_rank_is_refused(tmp_path):
    base, _, _, _ = saved_pair(tmp_path)
    model = get_peft_model(copy.deepcopy(base), KINDS["Linear"].config(accumulator_rank=4))
    with pytest.raises(RuntimeError, match="size mismatch"):
        set_peft_model_state_dict(model, load_peft_weights(tmp_path / "first", device="cpu"))


@pytest.mark.parametrize("accumulator_rank", [None, 5, 1000])
def test_loading_needs_no_arguments_whatever_the_accumulator_rank(tmp_path, accumulator_rank):
    base, model = KINDS["Linear"].filled(accumulator_rank=accumulator_rank)
    save(model, tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert torch.equal(output(loaded, floats(5, 14)), output(model, floats(5, 14)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_loading_onto_a_low_precision_base_keeps_the_state(tmp_path, dtype, autocast_adapter_dtype, low_cpu_mem_usage):
    base, model = KINDS["Linear"].filled()
    save(model, tmp_path)
    loaded = PeftModel.from_pretrained(
        copy.deepcopy(base).to(dtype), tmp_path, autocast_adapter_dtype=autocast_adapter_dtype,
        low_cpu_mem_usage=low_cpu_mem_usage,
    ).eval()  # fmt: skip
    for key, value in state_of(loaded, "default").items():
        if "scalora" in key:
            assert torch.equal(value, state_of(model, "default")[key]), key
            assert value.dtype in (torch.float32, torch.int64)
    x = floats(5, 14).to(dtype)
    rounded = copy.deepcopy(base).to(dtype).double()
    assert distance(output(loaded, x), oracle(rounded, loaded, x)) < (0.05 if dtype == torch.bfloat16 else 0.01)
    save(loaded, tmp_path / "again")
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    for key, value in load_file(tmp_path / "adapter_model.safetensors").items():
        if "scalora" in key:
            assert torch.equal(again[key], value)


def test_resumed_training_equals_straight_training(tmp_path):
    """Adapter from its folder and optimizer from its state: not a bit differs after further rescalings."""
    kind = KINDS["Linear"]
    base, x = kind.build(), kind.inputs()
    model = get_peft_model(copy.deepcopy(base), kind.config(scaling_interval=2, accumulator_rank=6))
    optimizer = train(model, x, 5)
    save(model, tmp_path)
    state = copy.deepcopy(optimizer.state_dict())
    train(model, x, 6, optimizer, seed=5)
    resumed = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True)
    optimizer = torch.optim.AdamW([p for p in resumed.parameters() if p.requires_grad], lr=5e-2)
    optimizer.load_state_dict(state)
    train(resumed, x, 6, optimizer, seed=5)
    check_filled(resumed)
    for key, value in state_of(resumed, "default").items():
        assert torch.equal(value, model.state_dict()[key]), key


# Files.


def test_model_card_and_configuration_tell_how_to_load(tmp_path):
    _, model = KINDS["Linear"].filled()
    model.add_adapter("other", KINDS["Linear"].config())
    save(model, tmp_path)
    for folder in (tmp_path, tmp_path / "other"):
        card = (folder / "README.md").read_text()
        assert card.count(install_command()) == 1
        assert "import peft_scalora" in card
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["peft_type"] == "SCALORA"
        assert install_command() in config["requires"]
        assert type(PeftConfig.from_pretrained(folder)) is ScaLoRAConfig
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("---\n"), "the metadata block has to stay at the top"
    assert "library_name: peft" in card.split("---")[1]


def test_card_above_an_adapter_of_another_name_says_how_to_load(tmp_path):
    """PEFT writes one card, into the root folder, where there is no adapter then."""
    kind = KINDS["Linear"]
    (tmp_path / "README.md").write_text("# A folder of mine\n")
    model = fill(get_peft_model(kind.build(), kind.config(), adapter_name="mine"), "mine")
    for _ in range(2):
        save(model, tmp_path / "run")
        card = (tmp_path / "run" / "README.md").read_text()
        assert card.count(install_command()) == card.count("library_name: peft") == 1
        assert "import peft_scalora" in (tmp_path / "run" / "mine" / "README.md").read_text()
    assert (tmp_path / "README.md").read_text() == "# A folder of mine\n"


def test_card_states_settings_rank_and_base(tmp_path):
    base = tiny_llama()
    base.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = scalora_config(target_modules=["q_proj", "v_proj"], use_rslora=True, smoothness=2.5)
    save(get_peft_model(base, config), tmp_path / "adapter")
    card = (tmp_path / "adapter" / "README.md").read_text()
    recorded = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_fingerprint"]
    for fact in (
        "arxiv.org/abs/2510.23818", "r=2, and up to 5", "lora_alpha=3", "smoothness=2.5", "use_rslora",
        "q_proj, v_proj", f"{tmp_path / 'base'} (fingerprint {fingerprint.short(recorded)})",
    ):  # fmt: skip
        assert fact in card, fact
    assert "| results" not in card


def test_card_states_the_results_of_the_last_checkpoint(tmp_path):
    _, model = KINDS["Linear"].filled()
    for step, loss in ((9, 3.5), (10, 2.25)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        log = [{"loss": 7.0, "step": 1}, {"loss": loss, "step": step}, {"eval_loss": 2 * loss, "eval_runtime": 1.0}]
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": log}))
    save(model, tmp_path)
    assert "| results | eval_loss 4.5, loss 2.25, step 10 |" in (tmp_path / "README.md").read_text()
    (tmp_path / "checkpoint-10" / "trainer_state.json").write_text('{"log_his')  # by a run that was killed
    save(model, tmp_path)
    assert "| results | eval_loss 7, loss 3.5, step 9 |" in (tmp_path / "README.md").read_text()


def test_card_of_the_user_is_kept(tmp_path):
    """Also what the user has written below the note that an earlier save has left."""
    _, model = KINDS["Linear"].filled()
    card = tmp_path / "README.md"
    card.write_text("---\nlicense: mit\n---\n\n# My adapter\n\nWörds of mine.\n", encoding="utf-8")
    save(model, tmp_path)
    card.write_text(card.read_text(encoding="utf-8") + "\n\n## Results\n\nVery gööd.\n", encoding="utf-8")
    save(model, tmp_path)
    text = card.read_text(encoding="utf-8")
    assert "license: mit" in text
    assert "Wörds of mine." in text
    assert "## Results\n\nVery gööd." in text
    assert text.count("Loading this ScaLoRA adapter") == 1
    assert "### Framework versions" in text, "what PEFT writes"


def test_note_is_that_of_the_latest_save(tmp_path):
    _, model = KINDS["Linear"].filled()
    save(model, tmp_path)
    _, model = KINDS["Linear"].filled(scaling="exact", scaling_interval=4)
    save(model, tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "scaling='exact', rescaled every 4 steps" in card
    assert "scaling='column'" not in card


def test_without_the_package_loading_fails_loudly(tmp_path):
    """And the folder itself says what is missing."""
    base = tiny_llama()
    base.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    save(fill(get_peft_model(base, scalora_config(target_modules=["q_proj"])), inputs=tokens()), tmp_path / "adapter")
    script = f"""
        import sys
        from transformers import AutoModelForCausalLM
        from peft import AutoPeftModel, PeftConfig, PeftModel
        assert "peft_scalora" not in sys.modules
        base, adapter = {str(tmp_path / "base")!r}, {str(tmp_path / "adapter")!r}
        model = AutoModelForCausalLM.from_pretrained(base)
        loads = [
            lambda: PeftConfig.from_pretrained(adapter),
            lambda: PeftModel.from_pretrained(model, adapter),
            lambda: AutoPeftModel.from_pretrained(adapter),
            lambda: model.load_adapter(adapter),
            lambda: AutoModelForCausalLM.from_pretrained(adapter),
        ]
        for index, load in enumerate(loads):
            try:
                load()
            except KeyError as error:
                print(index, error.args[0])
    """
    assert run_python(script).stdout.splitlines() == [f"{index} SCALORA" for index in range(5)]
