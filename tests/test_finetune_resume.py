"""Which run an output folder holds: another one is never continued."""

import json
import shutil
from pathlib import Path

import pytest
from helpers_runs import classification_rows, language_model, save_classifier, save_tokenizer, sentences, write_rows
from safetensors.torch import load_file
from transformers import set_seed

from peft_scalora.cli import main
from peft_scalora.finetuning.run import FinetuneSettings, finetune


@pytest.fixture
def interrupted(tmp_path):
    """A run of 12 steps that was stopped after the checkpoint of step 6."""
    settings = dict(
        model=save_classifier(tmp_path / "model"),
        data=write_rows(tmp_path / "rows.jsonl", classification_rows(60)),
        task="classification",
        output=str(tmp_path / "run"),
        r=2,
        max_steps=12,
        save_steps=6,
    )
    finetune(FinetuneSettings(**settings))
    stop(tmp_path / "run")
    return settings


def stop(run):
    """Remove what a run writes after the checkpoint of step 6."""
    for name in ("metrics.json", "adapter_model.safetensors"):
        (run / name).unlink()
    shutil.rmtree(run / "checkpoint-12")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("lora_alpha", 32, "lora_alpha=16 there, 32 here"),
        ("learning_rate", 1e-3, "learning_rate=0.0002 there, 0.001 here"),
        ("seed", 1, "seed=0 there, 1 here"),
        ("scaling", "scalar", "scaling='shrink' there, 'scalar' here"),
        ("text_fields", ("sentence",), "text_fields"),
    ],
)
def test_an_interrupted_run_does_not_go_on_with_other_settings(tmp_path, interrupted, name, value, said):
    kept = (tmp_path / "run" / "settings.json").read_text()
    with pytest.raises(ValueError, match=f"interrupted run with other settings \\({said}\\).*choose another folder"):
        finetune(FinetuneSettings(**interrupted | {name: value}))
    assert (tmp_path / "run" / "settings.json").read_text() == kept
    assert finetune(FinetuneSettings(**interrupted))["steps"] == 12


def test_an_interrupted_run_does_not_go_on_with_other_rows(interrupted):
    data = Path(interrupted["data"])
    kept = data.read_text()
    data.write_text(kept + '{"sentence": "red mat", "label": 1}\n')
    with pytest.raises(ValueError, match=r"an interrupted run, and the rows of data=.* have changed since"):
        finetune(FinetuneSettings(**interrupted))
    data.write_text(kept)
    assert finetune(FinetuneSettings(**interrupted))["steps"] == 12


def test_an_interrupted_run_may_go_on_for_longer_and_elsewhere(tmp_path, interrupted):
    moved = str(tmp_path / "moved")
    (tmp_path / "run").rename(moved)
    metrics = finetune(FinetuneSettings(**interrupted | {"max_steps": 14, "epochs": 2.0, "output": moved}))
    assert metrics["steps"] == 14
    recorded = json.loads((tmp_path / "moved" / "settings.json").read_text())["settings"]
    assert (recorded["max_steps"], recorded["output"]) == (14, moved)


def test_the_command_refuses_in_one_line(interrupted, capsys):
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in interrupted.items()]
    assert main(["finetune", *arguments, "--lora-alpha", "32"]) == 1
    assert "lora_alpha=16 there, 32 here" in capsys.readouterr().err


def test_before_the_first_checkpoint_settings_may_be_mended(tmp_path, interrupted):
    output = str(tmp_path / "new")
    with pytest.raises(ValueError, match="do not fit task"):
        finetune(FinetuneSettings(**interrupted | {"output": output, "label_field": "nothing"}))
    assert finetune(FinetuneSettings(**interrupted | {"output": output}))["steps"] == 12


@pytest.mark.parametrize("left", [None, "{broken", "[]"])
def test_checkpoints_that_do_not_say_their_settings_are_refused(tmp_path, interrupted, left):
    path = tmp_path / "run" / "settings.json"
    path.unlink()
    if left is not None:
        path.write_text(left)
    with pytest.raises(ValueError, match=r"settings\.json.*choose another folder"):
        finetune(FinetuneSettings(**interrupted))


@pytest.mark.parametrize("method", ["scalora", "lora"])
def test_a_run_does_not_go_on_with_another_base_model(tmp_path, method):
    settings = FinetuneSettings(
        model=str(tmp_path / "model"),
        data=write_rows(tmp_path / "rows.jsonl", [{"text": text} for text in sentences(60)]),
        task="causal-lm",
        output=str(tmp_path / "run"),
        method=method,
        r=2,
        max_steps=12,
        save_steps=6,
    )
    model = language_model()
    model.save_pretrained(settings.model)
    save_tokenizer(settings.model)
    whole = finetune(settings)
    weights = load_file(tmp_path / "run" / "adapter_model.safetensors")
    stop(tmp_path / "run")
    set_seed(1)
    other = language_model()
    for weight in other.parameters():
        weight.data.mul_(1.1)
    other.save_pretrained(settings.model)
    with pytest.raises(ValueError, match=r"another base model.*sampled weights have another value"):
        finetune(settings)
    model.save_pretrained(settings.model)
    assert finetune(settings)["eval_loss"] == whole["eval_loss"]
    again = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert all(weights[key].equal(again[key]) for key in weights)
