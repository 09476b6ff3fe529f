"""Experiment folders for PEFT's MetaMathQA benchmark, trained as its run.py trains, and the way to run that."""

import json
import sys
from pathlib import Path

import pytest
import torch
from helpers_integrations import TOKENS, check_adapter
from helpers_runs import language_model
from peft import PeftConfig, get_peft_model
from transformers import get_cosine_schedule_with_warmup

from peft_scalora.integrations import run_script

EXPERIMENTS = Path(__file__).parents[2] / "examples" / "metamathqa" / "experiments" / "scalora"


@pytest.mark.parametrize("name", [path.name for path in sorted(EXPERIMENTS.iterdir())])
def test_an_experiment_trains(name, tmp_path):
    parameters = EXPERIMENTS / name / "training_params.json"
    optimizer_kwargs = {"lr": 1e-4, "weight_decay": 0.1}  # the benchmark's default
    if parameters.exists():
        optimizer_kwargs = json.loads(parameters.read_text())["optimizer_kwargs"]
    config = PeftConfig.from_pretrained(EXPERIMENTS / name)
    model = get_peft_model(language_model(), config, autocast_adapter_dtype=True)
    # Steps that are large enough to be seen in 20 of them.
    optimizer = torch.optim.AdamW(model.parameters(), **optimizer_kwargs | {"lr": 200 * optimizer_kwargs["lr"]})
    schedule = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=2, num_training_steps=24)
    for _ in range(24):
        optimizer.zero_grad()
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.save_pretrained(tmp_path / "adapter")
    check_adapter(tmp_path / "adapter", language_model, tmp_path / "plain", {"input_ids": TOKENS})


def test_a_script_that_knows_peft_alone_reads_an_experiment(tmp_path, monkeypatch, capsys):
    (tmp_path / "beside.py").write_text("from peft import PeftConfig\n")
    script = tmp_path / "run.py"
    script.write_text(
        "import sys\nfrom beside import PeftConfig\n"
        "if __name__ == '__main__':\n    print(sys.argv[1], PeftConfig.from_pretrained(sys.argv[2]).peft_type.value)\n"
    )
    monkeypatch.setattr(sys, "argv", ["run_script", str(script), "-v", str(EXPERIMENTS / "llama-3.2-3B-rank32")])
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    run_script.main()
    assert capsys.readouterr().out == "-v SCALORA\n"
