import copy
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers_models import KINDS
from helpers_runs import language_model
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils.hotswap import prepare_model_for_compiled_hotswap
from safetensors.torch import load_file
from torch import nn

from peft_scalora import ScaLoRAConfig, effective_rank, export_lora
from peft_scalora.cli import main
from peft_scalora.export.info import adapter_info, format_info
from peft_scalora.export.lora import export_folder

IDS = torch.arange(5, 17)[None]


def train(model, run, steps=12, seed=0):
    """Really train, so that the accumulated state is filled."""
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    for _ in range(steps):
        run(model).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def trained_llama(**overrides):
    settings = dict(r=2, target_modules=["q_proj", "v_proj", "down_proj", "embed_tokens"], scaling_interval=2)
    settings |= dict(scaling="column")  # of small factors too
    config = ScaLoRAConfig(**settings | dict(task_type="CAUSAL_LM") | overrides)
    model = get_peft_model(language_model(), config)
    return train(model, lambda m: m(input_ids=torch.randint(5, 17, (4, 8))).logits)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, groups=2)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(torch.tanh(self.grouped(torch.tanh(self.conv(x)))).mean((-1, -2)))


def relative(left, right):
    return float((left - right).norm() / right.norm())


ANCHORED = {  # by names in the base model, as in PEFT's documentation
    "rank_pattern": {r"^model\.layers\.0\.self_attn\.v_proj": 4},
    "alpha_pattern": {"^model.layers.1.self_attn.q_proj": 40, "embed_tokens": 3},
}


@pytest.mark.parametrize(
    "overrides", [{}, {"accumulator_rank": 64}, {"use_rslora": True}, {"rank_pattern": {"v_proj": 4}}, ANCHORED]
)
def test_exact_export_is_plain_lora_with_the_same_output(tmp_path, overrides):
    model = trained_llama(**overrides)
    report = export_lora(model, tmp_path / "plain")
    config = PeftConfig.from_pretrained(tmp_path / "plain")
    assert type(config) is LoraConfig and config.r == report.rank and report.relative_error == 0
    plain = PeftModel.from_pretrained(language_model(), str(tmp_path / "plain")).eval()
    assert relative(logits(plain), logits(language_model().eval())) > 1e-2  # the adapter does something
    assert relative(logits(plain), logits(model)) < 1e-5


def test_exported_folder_loads_where_the_package_is_not_imported(tmp_path):
    model = trained_llama()
    export_lora(model, tmp_path / "plain")
    language_model().save_pretrained(tmp_path / "base")
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM; from peft import PeftModel\n"
        f"base = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'base')!r})\n"
        f"model = PeftModel.from_pretrained(base, {str(tmp_path / 'plain')!r}).eval()\n"
        "assert not any(name.startswith('peft_scalora') for name in sys.modules)\n"
        f"torch.save(model(input_ids=torch.arange(5, 17)[None]).logits, {str(tmp_path / 'logits.pt')!r})\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert relative(torch.load(tmp_path / "logits.pt"), logits(model)) < 1e-5


@pytest.mark.parametrize("overrides", [{}, ANCHORED])
def test_export_from_the_saved_folder_equals_export_from_the_model(tmp_path, overrides):
    model = trained_llama(**overrides)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(language_model(), tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded), logits(model))
    export_lora(model, tmp_path / "one")
    export_folder(str(tmp_path / "adapter"), str(tmp_path / "two"))
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_truncated_export_states_its_error(tmp_path):
    model = trained_llama()
    report = export_lora(model, tmp_path / "plain", rank=3)
    assert report.rank == 3
    plain = PeftModel.from_pretrained(language_model(), str(tmp_path / "plain"))
    modules, whole, lost = dict(plain.named_modules()), 0.0, 0.0
    for name, layer in model.named_modules():
        if hasattr(layer, "scalora_U"):
            delta = layer.get_delta_weight("default").detach().double().numpy()
            error = np.linalg.norm(modules[name].get_delta_weight("default").detach().double().numpy() - delta)
            tail = np.linalg.svd(delta, compute_uv=False)[3:]
            assert error == pytest.approx(np.linalg.norm(tail), rel=1e-3, abs=1e-6)
            assert report.layer_errors[name] == pytest.approx(error / np.linalg.norm(delta), rel=1e-3, abs=1e-6)
            whole, lost = whole + np.linalg.norm(delta) ** 2, lost + error**2
    assert report.relative_error == pytest.approx((lost / whole) ** 0.5, rel=1e-3)
    assert f"{report.relative_error:.3g}" in (tmp_path / "plain" / "README.md").read_text()


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_an_export_in_half_precision_states_what_rounding_costs(tmp_path, dtype, rank):
    model = trained_llama(target_modules=["q_proj", "v_proj", "down_proj"])
    report = export_lora(model, tmp_path / "half", rank=rank, dtype=dtype)
    size = export_lora(model, tmp_path / "whole", rank=rank).size
    state = load_file(tmp_path / "half" / "adapter_model.safetensors")
    assert {t.dtype for t in state.values()} == {dtype} and report.size < size
    whole = lost = 0.0
    for name, layer in model.named_modules():
        if hasattr(layer, "scalora_U"):
            delta = layer.get_delta_weight("default").detach().double().numpy()
            B, A = (state[f"{name}.lora_{part}.weight"].double().numpy() for part in "BA")
            error = np.linalg.norm(B @ A - delta)
            assert report.layer_errors[name] == pytest.approx(error / np.linalg.norm(delta), rel=1e-3, abs=1e-6)
            whole, lost = whole + np.linalg.norm(delta) ** 2, lost + error**2
    assert 1e-4 < (lost / whole) ** 0.5 and report.relative_error == pytest.approx((lost / whole) ** 0.5, rel=1e-3)
    with pytest.raises(ValueError, match=r"dtype=torch.int8 must be torch.float32"):
        export_lora(model, tmp_path / "none", dtype=torch.int8)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_command_states_what_rounding_costs(tmp_path, capsys, dtype):
    model = trained_llama()
    model.save_pretrained(tmp_path / "adapter")
    report = export_lora(model, tmp_path / "expected", dtype=getattr(torch, dtype))
    assert main(["export", str(tmp_path / "adapter"), str(tmp_path / "plain"), "--dtype", dtype]) == 0
    assert f"relative error {report.relative_error:.3g} over" in capsys.readouterr().out
    assert (report.relative_error > 1e-4) == (dtype != "float32")
    name = "adapter_model.safetensors"
    assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes()


def test_a_report_is_told_in_three_lines(tmp_path):
    report = export_lora(trained_llama(), tmp_path / "plain")
    where, error, served = str(report).splitlines()
    assert where == f"wrote {tmp_path / 'plain'}: LoRA of rank {report.rank}, {report.size:,} bytes"
    assert error == f"relative error 0 over {len(report.layer_errors)} layers"
    assert served == f"vLLM serves it with --enable-lora --max-lora-rank {report.max_lora_rank}"


def test_export_keeps_what_else_the_adapter_saved(tmp_path):
    model = trained_llama(modules_to_save=["lm_head"], target_modules=["q_proj"])
    export_lora(model, tmp_path / "plain")
    plain = PeftModel.from_pretrained(language_model(), str(tmp_path / "plain")).eval()
    assert relative(logits(plain), logits(model)) < 1e-5


def test_export_of_convolutions_with_a_plain_lora_layer_and_a_changed_scale(tmp_path):
    config = ScaLoRAConfig(
        r=2, target_modules=["conv", "grouped", "head"], scaling="column", scaling_interval=2, lora_bias=True
    )
    with pytest.warns(UserWarning, match="grouped: rescaling is not defined"):
        model = get_peft_model(Convolutions(), config)
    train(model, lambda m: m(torch.randn(4, 3, 8, 8)))
    for layer in model.modules():
        if hasattr(layer, "set_scale"):
            layer.set_scale("default", 0.5)
    x = torch.randn(2, 3, 8, 8)
    export_lora(model, tmp_path / "plain")
    plain = PeftModel.from_pretrained(Convolutions(), str(tmp_path / "plain")).eval()
    # A layer that was plain LoRA is exported as it was configured, as its factors are.
    model.base_model.model.grouped.set_scale("default", 1.0)
    assert relative(plain(x), model(x)) < 1e-5


class Suffixes(nn.Module):
    """The name of the plain LoRA layer ends the name of a rescaled one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(4, 8, 3, groups=2)
        self.block = nn.ModuleDict({"conv": nn.Conv2d(8, 8, 3)})

    def forward(self, x):
        return self.block["conv"](torch.tanh(self.conv(x)))


def test_export_keeps_apart_layers_of_which_one_name_ends_another(tmp_path):
    config = ScaLoRAConfig(r=2, target_modules=["conv"], scaling="column", scaling_interval=2)
    with pytest.warns(UserWarning, match="conv: rescaling is not defined"):
        model = get_peft_model(Suffixes(), config)
    train(model, lambda m: m(torch.randn(4, 4, 8, 8)))
    export_lora(model, tmp_path / "plain")
    plain = PeftModel.from_pretrained(Suffixes(), str(tmp_path / "plain")).eval()
    x = torch.randn(2, 4, 8, 8)
    assert relative(plain(x), model(x)) < 1e-5


def test_rank_pattern_of_an_attention_holds_for_its_output_projection(tmp_path):
    kind = KINDS["MultiheadAttention"]
    base, model = kind.filled(rank_pattern={"^mha": 4})
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter").eval()
    assert relative(loaded(kind.inputs()), model(kind.inputs())) < 1e-5


def check_trained_export(model, base, folder):
    """Train `model` on random tokens; its export onto a new `base()` computes what it does, and the base does not."""
    train(model, lambda m: m(input_ids=torch.randint(5, 17, (4, 8))).logits)
    export_lora(model, folder)
    plain = PeftModel.from_pretrained(base(), str(folder)).eval()
    assert relative(logits(plain), logits(base().eval())) > 1e-2
    assert relative(logits(plain), logits(model)) < 1e-5


@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`")
@pytest.mark.parametrize(
    "overrides",
    [
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    ],
)
def test_export_with_tied_weights(tmp_path, overrides):
    def base():
        return language_model(tie_word_embeddings=True)

    model = get_peft_model(
        base(), ScaLoRAConfig(**dict(r=2, scaling="column", scaling_interval=2, task_type="CAUSAL_LM") | overrides)
    )
    check_trained_export(model, base, tmp_path / "plain")


def test_export_of_a_transformers_model_that_carries_the_adapter_itself(tmp_path):
    model = language_model()
    model.add_adapter(ScaLoRAConfig(r=2, target_modules=["q_proj", "v_proj"], scaling="column", scaling_interval=2))
    check_trained_export(model, language_model, tmp_path / "plain")


def test_export_of_a_model_padded_for_hotswapping(tmp_path):
    """The padded factors have another rank than the adapter was scaled for."""
    model = trained_llama(target_modules=["q_proj", "v_proj"])
    prepare_model_for_compiled_hotswap(model, target_rank=5)
    export_lora(model, tmp_path / "plain")
    plain = PeftModel.from_pretrained(language_model(), str(tmp_path / "plain")).eval()
    assert relative(logits(plain), logits(model)) < 1e-5


def test_errors_name_field_and_remedy(tmp_path):
    model = trained_llama()
    with pytest.raises(ValueError, match="adapter_name='other'"):
        export_lora(model, tmp_path / "plain", adapter_name="other")
    with pytest.raises(ValueError, match="rank=0 must be 1 or more"):
        export_lora(model, tmp_path / "plain", rank=0)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    with pytest.raises(FileExistsError, match="not an empty folder"):
        export_lora(model, tmp_path / "full")
    lora = get_peft_model(language_model(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="no ScaLoRA adapter"):
        export_lora(lora, tmp_path / "plain")
    lora.save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match="not SCALORA"):
        export_folder(str(tmp_path / "lora"), str(tmp_path / "plain"))
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json"):
        export_folder(str(tmp_path / "full"), str(tmp_path / "plain"))
    assert not (tmp_path / "plain").exists()


def test_info_and_effective_rank_count_singular_values(tmp_path):
    model = trained_llama(**ANCHORED)
    model.save_pretrained(tmp_path / "adapter")
    info, ranks = adapter_info(str(tmp_path / "adapter"), tol=0.05), effective_rank(model, tol=0.05)
    assert info["bytes"] == (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    for name, layer in model.named_modules():
        if hasattr(layer, "scalora_U"):
            sigma = np.linalg.svd(layer.get_delta_weight("default").detach().double().numpy(), compute_uv=False)
            row = info["layers"][name.removeprefix("base_model.model.")]
            assert ranks[name] == row["effective_rank"] == int((sigma > 0.05 * sigma[0]).sum())
            assert row["norm"] == pytest.approx(np.linalg.norm(sigma), rel=1e-5)
            assert name.removeprefix("base_model.model.") in format_info(info)
    assert max(ranks.values()) > 2


def test_effective_rank_rejects_what_it_cannot_count():
    model = trained_llama()
    with pytest.raises(ValueError, match=r"tol=1\.5"):
        effective_rank(model, tol=1.5)
    with pytest.raises(ValueError, match="adapter_name='other'"):
        effective_rank(model, adapter_name="other")
