"""`peft-scalora trl`: TRL's own scripts train ScaLoRA adapters."""

import json

import pytest
import trl
from helpers_integrations import check_language_model
from helpers_runs import WORDS, save_language_model, sentences, write_rows

from peft_scalora.cli import main

TEXTS = sentences(32)
PAIRS = [{"prompt": text, "chosen": " cat sat", "rejected": " dog ran"} for text in TEXTS]
ROWS = {
    "sft": [{"text": text} for text in TEXTS],
    "dpo": PAIRS,
    "grpo": [{"prompt": word} for word in WORDS],
}
OPTIONS = {
    "sft": ["--max_length", "16"],
    "dpo": ["--max_length", "16"],
    "grpo": ["--num_generations", "4", "--max_completion_length", "3", "--reward_funcs", "rewards_of_tests.of_words"],
}
REWARD = "def of_words(completions, **kwargs):\n    return [float(len(set(text))) for text in completions]\n"


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Return a function that gives the command line of a script, of 20 steps on a tiny model."""

    def arguments(script):
        (tmp_path / "data").mkdir(exist_ok=True)
        write_rows(tmp_path / "data" / "train.jsonl", ROWS[script])
        (tmp_path / "rewards_of_tests.py").write_text(REWARD)
        monkeypatch.syspath_prepend(tmp_path)
        return [
            "trl", script, "--model_name_or_path", save_language_model(tmp_path / "base"),
            "--dataset_name", str(tmp_path / "data"), "--output_dir", str(tmp_path / "run"),
            "--max_steps", "20", "--learning_rate", "2e-2", "--per_device_train_batch_size", "4",
            "--lora_r", "2", "--lora_target_modules", "all-linear", "--scaling", "column", "--scaling_interval", "2",
            "--use_cpu", "--bf16", "False", "--report_to", "none", "--disable_tqdm", "True", "--save_strategy", "no",
            *OPTIONS[script],
        ]  # fmt: skip

    return arguments


@pytest.mark.parametrize("script", ["sft", "dpo", "grpo"])
def test_a_script_trains_a_scalora_adapter(script, command, tmp_path):
    original = trl.get_peft_config
    assert main(command(script)) == 0
    assert trl.get_peft_config is original
    saved = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert (saved["peft_type"], saved["r"], saved["lora_alpha"]) == ("SCALORA", 2, 32)
    assert (saved["scaling"], saved["scaling_interval"], saved["smoothness"]) == ("column", 2, "auto")
    check_language_model(tmp_path / "run", tmp_path / "base", tmp_path / "plain")


def test_values_that_are_not_allowed_are_named(command, capsys):
    assert main([*command("sft"), "--scaling", "diagonal"]) == 1
    assert "scaling='diagonal' must be one of 'column'" in capsys.readouterr().err
    assert main([*command("sft"), "--use_dora"]) == 1
    assert "ScaLoRA does not support use_dora=True" in capsys.readouterr().err
