"""AutoPeftModel, and adapters that transformers itself loads, adds and saves."""

import copy
import os

import pytest
import torch
from helpers_adapters import save
from helpers_models import (
    SCALE,
    check_filled,
    dense_weights,
    distance,
    fill,
    output,
    saved_tensors,
    scalora_config,
    scalora_layers,
    tiny_llama,
    tokens,
    train,
    with_weights,
)
from peft import AutoPeftModel, AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from peft_scalora import ScaLoRAConfig


@pytest.fixture
def saved_llama(tmp_path):
    """A base model folder, an adapter folder that names it, the filled model and its output."""
    base = tiny_llama().eval()
    base.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    config = scalora_config(target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    model = fill(get_peft_model(copy.deepcopy(base), config), inputs=tokens())
    save(model, tmp_path / "adapter")
    with torch.no_grad():
        expected = output(model, tokens())
    assert distance(expected, output(base, tokens())) > 0.05
    return base, tmp_path, model, expected


@pytest.mark.parametrize("auto", [AutoPeftModel, AutoPeftModelForCausalLM])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_auto_peft_model(saved_llama, auto, low_cpu_mem_usage):
    """AutoPeftModel is for adapters without a task type: the class of the base model is in their configuration."""
    _, folder, model, expected = saved_llama
    if auto is AutoPeftModel:
        model.peft_config["default"].task_type = None
        save(model, folder / "adapter")
    loaded = auto.from_pretrained(folder / "adapter", low_cpu_mem_usage=low_cpu_mem_usage).eval()
    with torch.no_grad():
        assert torch.equal(output(loaded, tokens()), expected)
    assert type(loaded.peft_config["default"]) is ScaLoRAConfig


def test_transformers_loads_an_adapter_folder(saved_llama):
    base, folder, _, expected = saved_llama
    with torch.no_grad():
        assert torch.equal(output(AutoModelForCausalLM.from_pretrained(folder / "adapter").eval(), tokens()), expected)
        loaded = copy.deepcopy(base)
        loaded.load_adapter(folder / "adapter")
        assert torch.equal(output(loaded.eval(), tokens()), expected)
        loaded.disable_adapters()
        assert torch.equal(output(loaded, tokens()), output(base, tokens()))
        loaded.enable_adapters()
        assert torch.equal(output(loaded, tokens()), expected)
        loaded.load_adapter(folder / "adapter", adapter_name="again")
        loaded.set_adapter("again")
        assert torch.equal(output(loaded, tokens()), expected)
        loaded.delete_adapter("default")
        assert torch.equal(output(loaded, tokens()), expected)


def test_transformers_adds_trains_and_saves_an_adapter(saved_llama, tmp_path):
    base, _, _, _ = saved_llama
    model = copy.deepcopy(base)
    model.add_adapter(scalora_config(target_modules=["q_proj", "v_proj"]))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    train(model, tokens(), 4)
    check_filled(model)
    model.save_pretrained(tmp_path / "own")
    assert "adapter_model.safetensors" in os.listdir(tmp_path / "own")
    loaded = copy.deepcopy(base)
    loaded.load_adapter(tmp_path / "own")
    through_peft = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "own")
    with torch.no_grad():
        assert torch.equal(output(loaded.eval(), tokens()), output(model.eval(), tokens()))
        assert torch.equal(output(through_peft.eval(), tokens()), output(model, tokens()))


def test_generate_is_that_of_the_merged_model(saved_llama):
    _, _, model, _ = saved_llama
    merged = copy.deepcopy(model).merge_and_unload()
    prompt = {"input_ids": tokens(), "attention_mask": torch.ones_like(tokens())}
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(**prompt, **settings), merged.generate(**prompt, **settings))


@pytest.mark.parametrize("plain_first", [True, False])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True, "lora_dropout": 0.1}], ids=str)
def test_a_plain_lora_adapter_beside_a_scalora_adapter(plain_first, options):
    """Through transformers both kinds can be put on one model: each is what its own configuration says."""
    base = tiny_llama().eval()
    plain = LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "v_proj"], init_lora_weights=False, **options)
    scalora = scalora_config(target_modules=["q_proj", "v_proj"])
    model, alone = copy.deepcopy(base), copy.deepcopy(base)
    for name in ("plain", "scalora") if plain_first else ("scalora", "plain"):
        torch.manual_seed(9)
        model.add_adapter(copy.deepcopy(plain if name == "plain" else scalora), adapter_name=name)
    torch.manual_seed(9)
    alone.add_adapter(plain, adapter_name="plain")
    model.set_adapter("scalora")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".scalora" in name)
    train(model, tokens(), 4)
    model.eval()
    check_filled(model, "scalora")
    assert len(scalora_layers(model)) == 4
    weights = dense_weights(base, saved_tensors(model, "scalora"), SCALE)
    assert distance(output(model, tokens()), with_weights(base, weights, tokens())) < 1e-4
    with torch.no_grad():  # DoRA's magnitudes start where they change nothing
        for parts in (dict(model.named_parameters()), dict(alone.named_parameters())):
            for name in [name for name in parts if "magnitude" in name]:
                parts[name] *= 1.5
    model.set_adapter("plain")
    assert distance(output(model, tokens()), output(alone.eval(), tokens())) < 1e-5
    model.delete_adapter("scalora")
    assert distance(output(model, tokens()), output(alone, tokens())) < 1e-5
