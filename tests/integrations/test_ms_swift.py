"""`swift sft --tuner_type scalora`, with this package's tuner for --external_plugins."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers_integrations import TOKENS, check_language_model_in_a_new_process, outputs
from helpers_runs import language_model, save_language_model, sentences, write_rows
from peft import PeftModel, get_peft_model

from peft_scalora import ScaLoRAConfig

pytest.importorskip("swift", reason="ms-swift is not installed: make test-integrations")

ROWS = [
    {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "cat sat"}]}
    for text in sentences(32)
]


def swift(folder, *arguments):
    """Run ms-swift's command in a folder in which the plugin's one line stands."""
    (folder / "scalora.py").write_text("import peft_scalora.integrations.ms_swift\n")
    command = [Path(sys.executable).with_name("swift"), *arguments, "--external_plugins", "scalora.py"]
    result = subprocess.run(command, cwd=folder, env=os.environ | {"USE_HF": "1"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_command_trains_a_scalora_adapter(tmp_path):
    base = save_language_model(tmp_path / "base")
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)
    swift(
        tmp_path, "sft", "--model", base, "--model_type", "llama", "--template", "default", "--dataset", rows,
        "--tuner_type", "scalora", "--target_modules", "all-linear", "--lora_rank", "2", "--learning_rate", "2e-2",
        "--model_kwargs", '{"scalora_scaling_interval": 2, "scalora_scaling": "column"}', "--max_steps", "20",
        "--per_device_train_batch_size", "4", "--torch_dtype", "float32", "--bf16", "false", "--use_cpu", "true",
        "--output_dir", "run", "--add_version", "false", "--report_to", "none", "--check_model", "false",
    )  # fmt: skip
    adapter = tmp_path / "run" / "checkpoint-20"
    config = ScaLoRAConfig.from_pretrained(adapter)
    assert (config.r, config.scaling, config.scaling_interval) == (2, "column", 2)
    check_language_model_in_a_new_process(adapter, base, tmp_path / "plain")


def test_what_deepspeed_saves_is_completed(tmp_path):
    """Under DeepSpeed ms-swift hands over the trainable parameters, among which the accumulated change is not."""
    from peft_scalora.integrations.ms_swift import ScaLoRATuner

    model = get_peft_model(language_model(), ScaLoRAConfig(r=2, target_modules="all-linear", scaling_interval=1))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    for _ in range(4):
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    ScaLoRATuner.save_pretrained(model, tmp_path, state_dict=trained)
    loaded = ScaLoRATuner.from_pretrained(language_model(), tmp_path)
    assert isinstance(loaded, PeftModel)
    assert (outputs(loaded, {"input_ids": TOKENS}) - outputs(model, {"input_ids": TOKENS})).abs().max() < 1e-6
