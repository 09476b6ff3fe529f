"""`axolotl train` with the plugin, by the example that the documentation shows."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers_integrations import check_language_model_in_a_new_process
from helpers_runs import save_language_model, sentences, write_rows

from peft_scalora import ScaLoRAConfig

pytest.importorskip("axolotl", reason="axolotl is not installed: make test-integrations")

EXAMPLE = Path(__file__).parents[2] / "examples" / "axolotl.yaml"
ROWS = [
    {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "cat sat"}]}
    for text in sentences(32)
]
TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
SMALL = {
    "chat_template": "jinja",
    "chat_template_jinja": TEMPLATE,
    "scalora": {"scaling_interval": 2, "scaling": "column"},
    "lora_r": 2,
    "learning_rate": 2e-2,
    "micro_batch_size": 4,
    "sequence_len": 64,
    "max_steps": 20,
    "bf16": False,
    "special_tokens": {"pad_token": "[PAD]"},
}


def train(folder, **settings):
    """Run `axolotl train` on the example, with small settings in place of its own."""
    config = yaml.safe_load(EXAMPLE.read_text()) | SMALL | settings
    (folder / "small.yaml").write_text(yaml.safe_dump(config))
    command = [Path(sys.executable).with_name("axolotl"), "train", "small.yaml", "--launcher", "python"]
    environment = os.environ | {"AXOLOTL_DO_NOT_TRACK": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_the_example_trains_a_scalora_adapter(tmp_path):
    base = save_language_model(tmp_path / "base")
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)
    data = {"datasets": [{"path": rows, "ds_type": "json", "type": "chat_template"}], "base_model": base}
    result = train(tmp_path, **data)
    assert result.returncode == 0, result.stdout + result.stderr
    config = ScaLoRAConfig.from_pretrained(tmp_path / "run")
    assert (config.r, config.lora_alpha, config.scaling, config.scaling_interval) == (2, 16, "column", 2)
    check_language_model_in_a_new_process(tmp_path / "run", base, tmp_path / "plain")


def test_an_unknown_setting_is_refused(tmp_path):
    result = train(tmp_path, base_model=save_language_model(tmp_path / "base"), scalora={"scaling_intervall": 2})
    assert result.returncode != 0
    assert "scaling_intervall" in result.stdout + result.stderr
