"""Plain LoRA in memory, of one rank at every step of a training, and its way through TRL's adapter-only sync."""

import copy

import pytest
import torch
import vllm_rules
from accelerate import Accelerator
from helpers_models import (
    KINDS,
    SCALE,
    Linears,
    distance,
    every_layer_kind,
    fill,
    floats,
    oracle,
    output,
    scalora_config,
    scalora_layers,
    tiny_llama,
    tokens,
)
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from trl.experimental.async_distillation import async_distillation_trainer
from trl.experimental.async_grpo import AsyncGRPOConfig, async_grpo_trainer

from peft_scalora import lora_state_config, lora_state_dict, sync_trl_as_lora

LINEAR = ["q_proj", "v_proj", "down_proj"]


def plain_model(base, model, adapter="default", **options):
    """A model of PEFT's own LoRA that has received the state."""
    plain = get_peft_model(copy.deepcopy(base), lora_state_config(model, adapter))
    received = set_peft_model_state_dict(plain, lora_state_dict(model, adapter, **options))
    assert not received.unexpected_keys
    return plain.eval()


@every_layer_kind
def test_the_state_is_the_whole_change(kind):
    if "modules_to_save" in (kind.options or {}):
        kind = KINDS["Linear"]
    base, model = kind.filled()
    state, config = lora_state_dict(model), lora_state_config(model)
    assert type(config) is LoraConfig and config.lora_alpha == config.r
    assert all("lora_" in key and "scalora" not in key for key in state)
    expected = oracle(base, model, kind.inputs())
    assert distance(expected, output(base, kind.inputs())) > 1e-2  # the adapter does something
    assert distance(output(plain_model(base, model), kind.inputs()), expected) < 1e-5


@pytest.mark.parametrize("accumulator", ["merged", "factored"])
def test_the_state_is_exact_at_every_step_and_keeps_its_shapes(accumulator):
    base = tiny_llama().eval()
    config = scalora_config(accumulator=accumulator, target_modules="all-linear", task_type="CAUSAL_LM")
    twin, model = (get_peft_model(copy.deepcopy(base), copy.deepcopy(config)) for _ in range(2))
    twin.load_state_dict(model.state_dict())
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=2e-2) for m in (twin, model)]
    shapes, merged = set(), 0
    for step in range(8):
        for each, optimizer in zip((twin, model), optimizers):
            ids = tokens(length=5 + step % 2)
            each(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        state = lora_state_dict(model)
        shapes.add(tuple((key, tensor.shape, tensor.dtype) for key, tensor in state.items()))
        merged += sum(layer.merged_base is not None for layer in scalora_layers(model).values())
        for name, layer in scalora_layers(model).items():  # read as they are: a look by PEFT would end the merging
            B, A = (factor.detach().double() for factor in layer.factors("default"))
            change = SCALE * B @ A + layer.scalora_U["default"].double() @ layer.scalora_V["default"].double()
            assert distance(state[f"{name}.lora_B.weight"] @ state[f"{name}.lora_A.weight"], change) < 1e-5
    assert len(shapes) == 1
    assert lora_state_config(model).r == 2 + 5
    assert (merged > 0) == (accumulator == "merged"), "reading the state must leave the change in the base weights"
    # The twin, whose state nobody has read, has trained to the same bits.
    for ours, theirs in zip(model.parameters(), twin.parameters()):
        assert torch.equal(ours, theirs)
    assert distance(output(plain_model(base, model), tokens()), oracle(base, model, tokens())) < 1e-5


def test_layers_of_all_ranks_are_padded_to_the_highest():
    base = tiny_llama().eval()
    options = {"rank_pattern": {"v_proj": 4}, "accumulator_rank": None, "target_modules": LINEAR}
    model = fill(get_peft_model(copy.deepcopy(base), scalora_config(**options)), inputs=tokens())
    ranks = {layer.r["default"] + layer.accumulator("default").capacity for layer in scalora_layers(model).values()}
    assert len(ranks) > 1 and lora_state_config(model).r == max(ranks)
    ranks_sent = {tensor.shape["lora_B" in key] for key, tensor in lora_state_dict(model).items()}
    assert ranks_sent == {max(ranks)}
    scale = {
        name.removeprefix("base_model.model."): 3 / 4 if "v_proj" in name else 3 / 2 for name in scalora_layers(model)
    }
    assert distance(output(plain_model(base, model), tokens()), oracle(base, model, tokens(), scale=scale)) < 1e-5


def test_the_scale_that_was_set_is_in_the_state():
    base, model = KINDS["Linear"].filled()
    for layer in scalora_layers(model).values():
        layer.set_scale("default", 0.5)
    expected = oracle(base, model, floats(5, 14), factor=0.5)
    assert distance(output(plain_model(base, model), floats(5, 14)), expected) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_state_may_be_rounded(dtype):
    base, model = KINDS["Linear"].filled()
    assert {tensor.dtype for tensor in lora_state_dict(model, dtype=dtype).values()} == {dtype}
    error = distance(output(plain_model(base, model, dtype=dtype), floats(5, 14)), output(model, floats(5, 14)))
    assert 1e-5 < error < 3e-2


def test_a_transformers_model_that_carries_the_adapter_has_the_names_of_a_saved_one():
    model = tiny_llama()
    model.add_adapter(scalora_config(target_modules=LINEAR))
    assert lora_state_dict(model).keys() == lora_state_dict(KINDS["Llama"].filled(target_modules=LINEAR)[1]).keys()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"modules_to_save": ["lin1"], "target_modules": ["lin0"]}, r"modules_to_save=\['lin1'\] of adapter 'default'"),
        ({"bias": "lora_only"}, "bias='lora_only' of adapter 'default' trains weights that are no LoRA factors"),
        ({"lora_bias": True}, "lin0 of adapter 'default' has groups or a trained bias"),
    ],
)
def test_what_is_more_than_factors_is_refused(options, said):
    model = get_peft_model(Linears(), scalora_config(**{"target_modules": ["lin0", "lin1"]} | options))
    for function in (lora_state_dict, lora_state_config):
        with pytest.raises(ValueError, match=said):
            function(model)


def test_errors_name_field_and_remedy():
    base, model = KINDS["Linear"].filled()
    with pytest.raises(ValueError, match="no ScaLoRA adapter adapter_name='other'"):
        lora_state_dict(model, "other")
    with pytest.raises(ValueError, match="no ScaLoRA adapter"):
        lora_state_dict(get_peft_model(base, LoraConfig(target_modules=["lin0"])))
    with pytest.raises(ValueError, match=r"dtype=torch.int8 must be torch.float32"):
        lora_state_dict(model, dtype=torch.int8)
    next(iter(scalora_layers(model).values())).factors("default")[0].data.fill_(1e6)
    with pytest.raises(ValueError, match=r"cannot hold .*lora_B\.weight, which overflows: use torch\.bfloat16"):
        lora_state_dict(model, dtype=torch.float16)


# TRL's adapter-only sync.


@pytest.fixture
def synced(monkeypatch):
    """TRL's modules with the functions replaced, until the test ends."""
    for module in (async_grpo_trainer, async_distillation_trainer):
        for name in ("save_lora_adapter", "validate_lora_for_vllm_sync"):
            monkeypatch.setattr(module, name, getattr(module, name))
    sync_trl_as_lora()
    sync_trl_as_lora()  # a second call changes nothing


@pytest.mark.parametrize("trl", [async_grpo_trainer, async_distillation_trainer], ids=["GRPO", "distillation"])
@pytest.mark.parametrize("adapter", ["default", "policy"])
def test_trl_writes_what_its_server_takes(tmp_path, synced, trl, adapter):
    base = tiny_llama().eval()
    config = scalora_config(target_modules=LINEAR, task_type="CAUSAL_LM")
    model = get_peft_model(copy.deepcopy(base), config, adapter)
    for steps in (3, 6):  # the second folder takes the place of the first
        fill(model, adapter, inputs=tokens(), steps=steps)
        trl.save_lora_adapter(model, Accelerator(cpu=True), adapter, str(tmp_path / "policy"))
        loaded = vllm_rules.load(tmp_path / "policy", 8)
        for name, layer in scalora_layers(model).items():
            entry = loaded.pop(name.removeprefix("base_model.model."))
            assert distance(entry["scaling"] * entry["b"] @ entry["a"], layer.get_delta_weight(adapter)) < 1e-5
        assert not loaded
    served = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "policy")).eval()
    assert distance(output(served, tokens()), oracle(base, model, tokens(), adapter=adapter)) < 1e-5
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]


def server(max_lora_rank):
    return {
        "lora_config": {"max_lora_rank": max_lora_rank, "max_loras": 16},
        "parallel_config": {"data_parallel_size": 1},
    }


def test_trl_compares_the_servers_rank_with_that_of_the_whole_change(tmp_path, synced):
    model = get_peft_model(tiny_llama(), scalora_config(accumulator_rank=8, target_modules=LINEAR))
    arguments = AsyncGRPOConfig(str(tmp_path), report_to="none", use_cpu=True, bf16=False)
    with pytest.raises(ValueError, match=r"rank 10, but .*`--max-lora-rank 8`. Restart it with `--max-lora-rank 16`"):
        async_grpo_trainer.select_adapter_sync(server(8), model, arguments)
    assert async_grpo_trainer.select_adapter_sync(server(16), model, arguments)


def test_trl_sends_plain_lora_as_before(tmp_path, synced):
    model = get_peft_model(tiny_llama(), LoraConfig(r=3, target_modules=LINEAR, init_lora_weights=False))
    async_grpo_trainer.save_lora_adapter(model, Accelerator(cpu=True), "default", str(tmp_path / "policy"))
    loaded = vllm_rules.load(tmp_path / "policy", 8)
    assert {entry["a"].shape[0] for entry in loaded.values()} == {3}
    assert async_grpo_trainer.validate_lora_for_vllm_sync(model) is model.peft_config["default"]
