"""Folders for vLLM, judged by its own rules (vllm_rules.py), and merged models."""

import copy

import pytest
import torch
import vllm_rules
from helpers_adapters import save
from helpers_models import (
    KINDS,
    distance,
    fill,
    oracle,
    output,
    scalora_config,
    scalora_layers,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    tokens,
)
from helpers_runs import language_model, save_language_model
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from peft_scalora import export_lora, export_merged
from peft_scalora.cli import main
from peft_scalora.fingerprint import short
from peft_scalora.serving import max_lora_rank, obstacles

LINEAR = ["q_proj", "v_proj", "down_proj"]


def filled_llama(base=None, **options):
    base = tiny_llama() if base is None else base
    config = scalora_config(**{"target_modules": LINEAR, "task_type": "CAUSAL_LM"} | options)
    return fill(get_peft_model(base, config), inputs=tokens())


# vLLM.


@pytest.mark.parametrize("targets", [LINEAR, ["embed_tokens", "q_proj"], "all-linear"])
@pytest.mark.parametrize("rank", [None, 3])
def test_vllm_loads_what_is_exported_and_computes_the_same(tmp_path, targets, rank):
    model = filled_llama(target_modules=targets)
    report = export_lora(model, tmp_path / "plain", rank=rank)
    assert report.obstacles == []
    loaded = vllm_rules.load(tmp_path / "plain", report.max_lora_rank)
    error2 = norm2 = 0.0
    for name, layer in scalora_layers(model).items():
        entry = loaded.pop(name.removeprefix("base_model.model."))
        change = layer.get_delta_weight("default").detach().double()
        served = entry["scaling"] * entry["b"].double() @ entry["a"].double()
        served = served.T if "embed" in name else served
        error2, norm2 = error2 + (served - change).norm() ** 2, norm2 + change.norm() ** 2
    assert not loaded
    assert float((error2 / norm2) ** 0.5) == pytest.approx(report.relative_error, rel=1e-3, abs=1e-6)
    assert (report.relative_error > 0.01) == (rank == 3)


@pytest.mark.parametrize("rank", [1, 2, 7, 8, 9, 72, 128, 129, 300, 320, 400, 512])
def test_the_setting_for_a_rank_is_the_lowest_that_vllm_takes(rank):
    config = {"r": rank, "lora_alpha": rank, "target_modules": LINEAR}
    accepted = []
    for setting in range(1, 600):
        try:
            vllm_rules.check_config(config, setting)
            accepted.append(setting)
        except vllm_rules.Refused:
            pass
    assert max_lora_rank(rank) == accepted[0]
    assert max_lora_rank(513) is None


@pytest.mark.parametrize(
    "options, part",
    [
        ({"modules_to_save": ["lm_head"]}, "modules_to_save=['lm_head']"),
        ({"bias": "lora_only"}, "trained biases"),
        ({"lora_bias": True}, "trained biases"),
        ({"trainable_token_indices": {"embed_tokens": [3]}}, "tensors beside its factors"),
    ],
)
def test_what_vllm_refuses_is_said_before(tmp_path, options, part):
    report = export_lora(filled_llama(**options), tmp_path / "plain")
    assert any(part in obstacle for obstacle in report.obstacles)
    with pytest.raises(vllm_rules.Refused):
        vllm_rules.load(tmp_path / "plain", 512)
    card = (tmp_path / "plain" / "README.md").read_text()
    assert "vLLM does not serve it: " in card and part in card


def test_a_rank_above_all_settings_is_an_obstacle():
    (obstacle,) = obstacles(LoraConfig(r=600, target_modules=LINEAR), [])
    assert obstacle == "rank 600 is above 512: export with rank=512 or less"


def test_a_convolution_is_no_linear_layer_of_vllm(tmp_path):
    """Its names are those of linear layers: vLLM looks for the modules in the model that it serves."""
    report = export_lora(KINDS["Conv2d"].filled()[1], tmp_path / "plain")
    assert report.obstacles == []
    with pytest.raises(vllm_rules.Refused, match="received conv0"):
        vllm_rules.load(tmp_path / "plain", report.max_lora_rank)


def test_the_native_folder_is_refused_by_vllm(tmp_path):
    """Loudly: serving its factors alone would be the wrong model."""
    save(filled_llama(), tmp_path)
    with pytest.raises(vllm_rules.Refused, match=r"scalora_.*unsupported"):
        vllm_rules.load(tmp_path, 512)


def test_card_of_an_export_says_how_to_serve_it(tmp_path):
    model = filled_llama(r=4, accumulator_rank=8)
    report = export_lora(model, tmp_path / "plain")
    card = (tmp_path / "plain" / "README.md").read_text()
    assert f"--enable-lora --max-lora-rank {report.max_lora_rank}`" in card
    assert f"rank {report.rank}," in card and report.rank == 12 and report.max_lora_rank == 16
    assert f"(fingerprint {short(model.base_model.base_fingerprint)})" in card


def test_export_before_the_first_rescaling(tmp_path):
    """Nothing has been accumulated yet."""
    model = get_peft_model(tiny_llama(), scalora_config(target_modules=LINEAR, init_lora_weights=False))
    report = export_lora(model, tmp_path / "plain")
    assert report.rank == 2
    loaded = vllm_rules.load(tmp_path / "plain", report.max_lora_rank)
    for name, layer in scalora_layers(model).items():
        entry = loaded[name.removeprefix("base_model.model.")]
        assert distance(entry["b"] @ entry["a"], layer.get_delta_weight("default")) < 1e-5


# Merged models.

BUILDS = {
    "Llama": (tiny_llama, AutoModelForCausalLM, {"target_modules": [*LINEAR, "embed_tokens", "lm_head"]}),
    "tied, embeddings": (
        lambda: tiny_llama(tie_word_embeddings=True),
        AutoModelForCausalLM,
        {"target_modules": ["embed_tokens", "q_proj"]},
    ),
    "tied, head": (
        lambda: tiny_llama(tie_word_embeddings=True),
        AutoModelForCausalLM,
        {"target_modules": ["lm_head", "q_proj"]},
    ),
    "tied, neither": (lambda: tiny_llama(tie_word_embeddings=True), AutoModelForCausalLM, {"target_modules": LINEAR}),
    "GPT-2": (tiny_gpt2, AutoModelForCausalLM, {"target_modules": ["c_attn", "wte"], "fan_in_fan_out": True}),
    "BERT": (
        tiny_bert,
        AutoModelForSequenceClassification,
        {"target_modules": ["query"], "modules_to_save": ["classifier"], "task_type": "SEQ_CLS"},
    ),
}


@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`")
@pytest.mark.parametrize("build, auto, options", BUILDS.values(), ids=BUILDS)
def test_merged_model_computes_the_dense_sum(tmp_path, build, auto, options):
    base = build().eval()
    model = fill(get_peft_model(copy.deepcopy(base), scalora_config(**options)), inputs=tokens())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = output(model, tokens())
    report = export_merged(model, tmp_path / "merged")
    loaded = auto.from_pretrained(tmp_path / "merged").eval()
    assert distance(output(loaded, tokens()), oracle(base, model, tokens())) < 1e-5
    assert report.relative_error < 1e-6 and report.dtype == torch.float32
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(output(model, tokens()), expected)


def test_merged_model_is_rounded_once(tmp_path):
    """The error that is reported, against explicit float64 sums; twice rounding would be worse."""
    base = tiny_llama().to(torch.bfloat16)
    model = filled_llama(base)
    weights = {name: layer.base_layer.weight.detach().double() for name, layer in scalora_layers(model).items()}
    report = export_merged(model, tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert loaded.dtype == report.dtype == torch.bfloat16
    error2 = norm2 = 0.0
    for name, layer in scalora_layers(model).items():
        change = layer.get_delta_weight("default").detach().double()
        written = loaded.get_submodule(name.removeprefix("base_model.model.")).weight.detach().double()
        error2 += (written - weights[name] - change).norm() ** 2
        norm2 += change.norm() ** 2
        expected = (weights[name] + change).to(torch.bfloat16).double()
        assert (written == expected).double().mean() > 0.99
    assert report.relative_error == pytest.approx(float((error2 / norm2) ** 0.5), rel=1e-2)
    wide = export_merged(model, tmp_path / "wide", dtype=torch.float32)
    assert wide.relative_error < 1e-5 < report.relative_error
    card = (tmp_path / "merged" / "README.md").read_text()
    assert f"{report.relative_error:.3g}" in card and "in bfloat16" in card


def test_merged_model_of_another_adapter(tmp_path):
    model = filled_llama()
    model.add_adapter("other", scalora_config(target_modules=["k_proj"]))
    fill(model, "other", tokens(), seed=5)
    model.set_adapter("other")
    expected = output(model, tokens())
    export_merged(model, tmp_path / "merged", adapter_name="other")
    assert distance(output(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), tokens()), expected) < 1e-5


def test_merged_model_has_the_scale_that_was_set(tmp_path):
    model = filled_llama()
    for layer in scalora_layers(model).values():
        layer.set_scale("default", 0.5)
    expected = output(model, tokens())
    assert export_merged(model, tmp_path / "merged").relative_error < 1e-6
    assert distance(output(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), tokens()), expected) < 1e-5


def test_command_writes_the_merged_model_with_its_tokenizer(tmp_path, capsys):
    save_language_model(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    ids = tokens() % 12 + 5
    model = fill(get_peft_model(base, scalora_config(target_modules=LINEAR, task_type="CAUSAL_LM")), inputs=ids)
    save(model, tmp_path / "adapter")
    assert main(["export", str(tmp_path / "adapter"), str(tmp_path / "merged"), "--merged"]) == 0
    assert "merged model in float32" in capsys.readouterr().out
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert distance(output(loaded, ids), output(model, ids)) < 1e-5
    assert (tmp_path / "merged" / "tokenizer_config.json").exists()
    language_model().save_pretrained(tmp_path / "elsewhere")
    arguments = ["export", str(tmp_path / "adapter"), str(tmp_path / "again"), "--merged", "--base"]
    assert main([*arguments, str(tmp_path / "elsewhere")]) == 0
    assert not (tmp_path / "again" / "tokenizer_config.json").exists()
    assert main([*arguments, str(tmp_path / "elsewhere"), "--rank", "3"]) == 1


def test_command_merges_a_classifier_of_its_own_number_of_labels(tmp_path):
    tiny_bert().bert.save_pretrained(tmp_path / "base")  # without a head
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=5)
    model = fill(get_peft_model(base, scalora_config(target_modules=["query"], task_type="SEQ_CLS")), inputs=tokens())
    save(model, tmp_path / "adapter")
    assert main(["export", str(tmp_path / "adapter"), str(tmp_path / "merged"), "--merged"]) == 0
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert distance(output(loaded, tokens()), output(model, tokens())) < 1e-5


def test_what_cannot_be_merged_is_refused(tmp_path):
    model = filled_llama()
    with pytest.raises(ValueError, match="adapter_name='other'"):
        export_merged(model, tmp_path / "merged", adapter_name="other")
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"\['default'\] are merged.*unmerge_adapter"):
        export_merged(model, tmp_path / "merged")
    with pytest.raises(ValueError, match=r"transformers models, not Linears.*merge_and_unload"):
        export_merged(KINDS["Linear"].filled()[1], tmp_path / "merged")
    lora = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="no ScaLoRA adapter"):
        export_merged(lora, tmp_path / "merged")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    with pytest.raises(FileExistsError, match="not an empty folder"):
        export_merged(filled_llama(), tmp_path / "full")
    assert not (tmp_path / "merged").exists()
