"""Folders for vLLM, judged by its own rules (vllm_rules.py)."""

import pytest
import vllm_rules
from helpers_adapters import save
from helpers_models import (
    KINDS,
    distance,
    fill,
    scalora_config,
    scalora_layers,
    tiny_llama,
    tokens,
)
from peft import LoraConfig, get_peft_model

from peft_scalora import export_lora
from peft_scalora.files.fingerprint import short
from peft_scalora.files.vllm import max_lora_rank, obstacles

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
