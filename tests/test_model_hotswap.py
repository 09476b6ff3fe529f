"""Swapping an adapter for another one in place."""

import copy

import pytest
import torch
from helpers_adapters import saved_pair, state_of
from helpers_models import KINDS, distance, every_accumulator, fill, oracle, output, train
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap


@pytest.mark.parametrize("name", ["Linear", "Conv1D", "Conv2d", "Llama"])  # PEFT cannot swap embeddings
@every_accumulator
def test_hotswap_gives_the_swapped_in_adapter(tmp_path, name, accumulator_rank):
    options = {"target_modules": ["q_proj", "v_proj"]} if name == "Llama" else {}
    base, first, second, x = saved_pair(tmp_path, name, accumulator_rank=accumulator_rank, **options)
    model = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "first").eval()
    assert torch.equal(output(model, x), output(first, x))
    hotswap_adapter(model, tmp_path / "second", adapter_name="default", torch_device="cpu")
    assert torch.equal(output(model, x), output(second, x))
    with model.disable_adapter():
        assert torch.equal(output(model, x), output(base, x))
    hotswap_adapter(model, tmp_path / "first", adapter_name="default", torch_device="cpu")
    assert torch.equal(output(model, x), output(first, x))


def test_hotswap_to_a_fresh_adapter_removes_the_accumulated_change(tmp_path):
    base, _, _, x = saved_pair(tmp_path)
    get_peft_model(copy.deepcopy(base), KINDS["Linear"].config()).save_pretrained(tmp_path / "fresh")
    model = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "first").eval()
    hotswap_adapter(model, tmp_path / "fresh", adapter_name="default", torch_device="cpu")
    assert torch.equal(output(model, x), output(base, x))


def test_hotswap_to_an_adapter_on_fewer_layers(tmp_path):
    base, _, _, x = saved_pair(tmp_path)
    _, fewer = KINDS["Linear"].filled(target_modules=["lin1"])
    fewer = fill(get_peft_model(copy.deepcopy(base), KINDS["Linear"].config(target_modules=["lin1"])))
    fewer.save_pretrained(tmp_path / "fewer")
    model = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "first").eval()
    hotswap_adapter(model, tmp_path / "fewer", adapter_name="default", torch_device="cpu")
    assert distance(output(model, x), oracle(base, fewer, x)) < 1e-5


def test_hotswap_into_a_compiled_model(tmp_path):
    base, first, second, x = saved_pair(tmp_path)
    model = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "first").eval()
    prepare_model_for_compiled_hotswap(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        assert distance(output(compiled, x), output(first, x)) < 1e-5
        hotswap_adapter(compiled, tmp_path / "second", adapter_name="default", torch_device="cpu")
        assert distance(output(compiled, x), output(second, x)) < 1e-5
    torch._dynamo.reset()


def test_hotswap_into_padded_factors(tmp_path):
    base, first, second, x = saved_pair(tmp_path)
    model = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "first").eval()
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    assert distance(output(model, x), output(first, x)) < 1e-5
    hotswap_adapter(model, tmp_path / "second", adapter_name="default", torch_device="cpu")
    assert distance(output(model, x), output(second, x)) < 1e-5


def test_hotswap_after_preparing_overwrote_the_configured_rank_is_refused(tmp_path):
    """Whether the ranks agree, and with them the scales of the accumulated changes, can no longer be told."""
    base, first, _, x = saved_pair(tmp_path)
    model = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "first").eval()
    prepare_model_for_compiled_hotswap(model, target_rank=8, config=model.peft_config)
    with pytest.raises(ValueError, match="for r, 8 != 2"):
        hotswap_adapter(model, tmp_path / "second", adapter_name="default", torch_device="cpu")
    assert distance(output(model, x), output(first, x)) < 1e-5


@pytest.mark.parametrize(
    ("field", "other"),
    [
        ("r", {"r": 3, "lora_alpha": 3}),
        ("accumulator_rank", {"accumulator_rank": 4}),
        ("use_rslora", {"use_rslora": True}),
        ("alpha_pattern", {"alpha_pattern": {"lin0": 5}}),
        ("rank_pattern", {"rank_pattern": {"lin0": 5}}),
    ],
)
def test_hotswap_refuses_another_configuration(tmp_path, field, other):
    base, first, _, x = saved_pair(tmp_path)
    fill(get_peft_model(copy.deepcopy(base), KINDS["Linear"].config(**other))).save_pretrained(tmp_path / "odd")
    model = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "first").eval()
    with pytest.raises(ValueError, match=f"for {field}, "):
        hotswap_adapter(model, tmp_path / "odd", adapter_name="default", torch_device="cpu")
    assert torch.equal(output(model, x), output(first, x))


def test_hotswap_refuses_plain_lora(tmp_path):
    base, _, _, _ = saved_pair(tmp_path)
    get_peft_model(copy.deepcopy(base), LoraConfig(r=2, lora_alpha=3, target_modules=["lin0", "lin1"])).save_pretrained(
        tmp_path / "plain"
    )
    model = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "first")
    with pytest.raises(ValueError, match="Incompatible PEFT types"):
        hotswap_adapter(model, tmp_path / "plain", adapter_name="default", torch_device="cpu")


def test_training_goes_on_after_a_hotswap(tmp_path):
    """The swapped-in progress counts: the accumulator is appended to where the new adapter left off."""
    base, _, second, x = saved_pair(tmp_path, accumulator_rank=14)
    model = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "first", is_trainable=True)
    hotswap_adapter(model, tmp_path / "second", adapter_name="default", torch_device="cpu")
    train(model.train(), x, 3, seed=5)
    train(second.train(), x, 3, seed=5)
    for key, value in state_of(model, "default").items():
        assert torch.equal(value, second.state_dict()[key]), key
