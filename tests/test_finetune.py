import gzip
import json
import os
from dataclasses import fields, replace

import numpy as np
import pytest
from helpers_runs import NO_DROPOUT, classification_rows, save_classifier, save_language_model, sentences, write_rows
from peft import LoraConfig, PeftConfig
from safetensors.torch import load_file
from scipy.stats import pearsonr
from transformers import SchedulerType

from peft_scalora import ScaLoRAConfig
from peft_scalora.cli import main
from peft_scalora.files.atomic import replace_file, replacing
from peft_scalora.finetuning.data import Fields, encode, find_fields, load_rows
from peft_scalora.finetuning.run import FinetuneSettings, NonFiniteLoss, classification_metrics, finetune
from peft_scalora.maths.scaling import SCALINGS
from peft_scalora.version import install_command


def settings(tmp_path, task="classification", **overrides):
    if task == "classification":
        model, rows = save_classifier(tmp_path / "model"), classification_rows(120)
    else:
        model, rows = save_language_model(tmp_path / "model"), [{"text": text} for text in sentences(120)]
    defaults = dict(
        model=model,
        data=write_rows(tmp_path / "rows.jsonl", rows),
        task=task,
        output=str(tmp_path / "run"),
        r=2,
        learning_rate=1e-2,
        max_steps=12,
        scaling_interval=3,
        logging_steps=4,
        save_steps=6,
    )
    return FinetuneSettings(**defaults | overrides)


@pytest.mark.parametrize("task", ["classification", "causal-lm"])
def test_a_run_writes_adapter_metrics_plots_and_card(tmp_path, task):
    metrics = finetune(settings(tmp_path, task))
    files = set(os.listdir(tmp_path / "run"))
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md", "metrics.json", "loss.png"} <= files
    assert "scalora_rank.png" in files
    assert isinstance(PeftConfig.from_pretrained(tmp_path / "run"), ScaLoRAConfig)
    assert install_command() in (tmp_path / "run" / "README.md").read_text()
    saved = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert saved["steps"] == metrics["steps"] == 12 and np.isfinite(saved["eval_loss"])
    assert saved["settings"]["learning_rate"] == 1e-2 and saved["effective_rank"] > 0
    assert saved["checkpoint_bytes"] == (tmp_path / "run" / "adapter_model.safetensors").stat().st_size


@pytest.mark.parametrize("task", ["classification", "causal-lm"])
def test_accumulated_batches_are_one_large_batch(tmp_path, task):
    one = settings(tmp_path, task, batch_size=8)
    if task == "classification":
        save_classifier(one.model, **NO_DROPOUT)
    two = replace(one, batch_size=4, gradient_accumulation_steps=2, output=str(tmp_path / "parts"))
    whole, parts = finetune(one), finetune(two)
    losses = [[entry["loss"] for entry in run["log"] if "loss" in entry] for run in (whole, parts)]
    norms = [[entry["grad_norm"] for entry in run["log"] if "grad_norm" in entry] for run in (whole, parts)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and len(losses[0]) == 3
    assert norms[0] == pytest.approx(norms[1], rel=1e-2)


def test_an_interrupted_run_continues_to_the_same_end(tmp_path):
    whole = finetune(settings(tmp_path))
    stopped = settings(tmp_path, output=str(tmp_path / "stopped"))
    finetune(stopped)
    # What an interruption between the checkpoints leaves behind.
    for name in ("metrics.json", "adapter_model.safetensors", "checkpoint-12"):
        path = tmp_path / "stopped" / name
        path.rename(tmp_path / f"removed-{name}")
    resumed = finetune(stopped)
    assert resumed["eval_loss"] == whole["eval_loss"]
    one, two = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("run", "stopped"))
    assert all((one[key] == two[key]).all() for key in one)


def test_a_finished_run_returns_its_metrics_and_refuses_other_settings(tmp_path):
    first = finetune(settings(tmp_path))
    changed = (tmp_path / "run" / "adapter_model.safetensors").stat().st_mtime_ns
    assert finetune(settings(tmp_path))["eval_loss"] == first["eval_loss"]
    assert (tmp_path / "run" / "adapter_model.safetensors").stat().st_mtime_ns == changed
    with pytest.raises(ValueError, match="a finished run with other settings \\(r=2 there, 3 here\\)"):
        finetune(settings(tmp_path, r=3))


def test_changed_data_are_refused_by_a_finished_run(tmp_path, capsys):
    run = settings(tmp_path)
    first = finetune(run)
    assert "nothing was trained" not in capsys.readouterr().err
    assert finetune(run)["eval_loss"] == first["eval_loss"]
    assert f"{run.output} holds this run, finished" in (said := capsys.readouterr().err)
    assert "nothing was trained" in said
    write_rows(tmp_path / "rows.jsonl", [*classification_rows(119), {"sentence": "red mat", "label": 1}])
    with pytest.raises(ValueError, match=r"a finished run, and the rows of data=.* have changed since"):
        finetune(run)


def test_files_of_others_are_not_overwritten(tmp_path):
    run = settings(tmp_path)
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "README.md").write_text("mine")
    (folder / "settings.json").write_text("{}")
    with pytest.raises(FileExistsError, match="is not empty and holds no run"):
        finetune(run)
    assert sorted(os.listdir(folder)) == ["README.md", "settings.json"]
    assert (folder / "README.md").read_text() == "mine"


def test_a_run_that_blew_up_says_so(tmp_path, capsys):
    run = settings(tmp_path)
    arguments = [f"--{name.replace('_', '-')}={getattr(run, name)}" for name in ("model", "data", "task", "output")]
    arguments += ["--learning-rate=10", "--max-steps=40", "--warmup-ratio=0.5", "--r=2"]
    assert main(["finetune", *arguments]) == 3
    printed = capsys.readouterr().out
    assert printed.startswith("WARNING: ") and "far above the 0.6" in printed
    stability = json.loads((tmp_path / "run" / "metrics.json").read_text())["stability"]
    assert stability["verdict"] == "diverged" and "lower learning rate" in stability["advice"]
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()


def test_a_finished_run_is_prolonged(tmp_path):
    run = settings(tmp_path)
    finetune(run)
    assert finetune(replace(run, max_steps=16))["steps"] == 16
    with pytest.raises(ValueError, match="max_steps=16 there, 12 here"):
        finetune(run)


def test_lora_is_plain_lora(tmp_path):
    metrics = finetune(settings(tmp_path, method="lora", test_data=str(tmp_path / "rows.jsonl")))
    assert type(PeftConfig.from_pretrained(tmp_path / "run")) is LoraConfig
    assert metrics["effective_rank"] <= 2 and 0 <= metrics["test_accuracy"] <= 1


def test_a_diverging_run_stops_and_keeps_its_checkpoints(tmp_path):
    with pytest.raises(NonFiniteLoss, match="learning_rate=1e\\+30"):
        finetune(settings(tmp_path, learning_rate=1e30, warmup_ratio=0.0, logging_steps=1, save_steps=1))
    assert (tmp_path / "run" / "checkpoint-1" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("make", ["a file", "below a file"])
def test_an_output_that_cannot_be_written_is_found_before_training(tmp_path, make):
    (tmp_path / "file").write_text("")
    output = tmp_path / "file" if make == "a file" else tmp_path / "file" / "run"
    with pytest.raises(OSError, match="cannot be written to"):
        finetune(settings(tmp_path, output=str(output)))


def test_settings_are_checked():
    with pytest.raises(ValueError, match="task='translation' must be one of"):
        FinetuneSettings(model="m", data="d", output="o", task="translation")
    with pytest.raises(ValueError, match="method='dora'"):
        FinetuneSettings(model="m", data="d", output="o", task="causal-lm", method="dora")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("max_steps", 0, "max_steps=0 must be 1 or more, or -1"),
        ("smoothness", "abc", "smoothness='abc' must be a number or auto"),
        ("smoothness", -1, "smoothness=-1.0 must be above 0, or auto"),
        ("learning_rate", float("nan"), "learning_rate=nan must be above 0"),
        ("batch_size", 2.5, "batch_size=2.5 must be a whole number"),
        ("bf16", "maybe", "bf16='maybe' must be true or false"),
        ("lr_scheduler_type", "cosin", "must be one of linear, cosine"),
        ("early_stopping_patience", 2, "set eval_steps as well"),
    ],
)
def test_settings_that_mean_nothing_are_refused(name, value, said):
    with pytest.raises(ValueError, match=said):
        FinetuneSettings(model="m", data="d", output="o", task="causal-lm", **{name: value})


def test_settings_are_converted_to_their_types():
    """YAML takes 2e-4 for a string, and a command line has nothing else."""
    run = FinetuneSettings(model="m", data="d", output="o", task="causal-lm", learning_rate="2e-4", epochs="2", r="4")
    assert (run.learning_rate, run.epochs, run.r) == (2e-4, 2.0, 4)
    assert FinetuneSettings("m", "d", "causal-lm", "o", text_fields="a,b").text_fields == ("a", "b")


def test_the_choices_are_those_of_the_method():
    choices = {setting.name: setting.metadata["allowed"] for setting in fields(FinetuneSettings)}
    assert set(choices["scaling"]) == set(SCALINGS)
    assert set(choices["lr_scheduler_type"]) <= {kind.value for kind in SchedulerType}


def test_classification_metrics_are_those_of_their_definitions():
    scores, labels = np.array([[2.0, 1], [0, 1], [3, 0], [0, 2]]), np.array([0, 1, 1, 1])
    metrics = classification_metrics((scores, labels))
    tp, tn, fp, fn = 2, 1, 0, 1
    matthews = (tp * tn - fp * fn) / ((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)) ** 0.5
    assert metrics == {"accuracy": 0.75, "matthews": pytest.approx(matthews)}
    values, targets = np.array([[0.1], [0.5], [0.3]]), np.array([1.0, 4.0, 3.0])
    assert classification_metrics((values, targets))["pearson"] == pytest.approx(pearsonr(values[:, 0], targets)[0])


# Data


def test_rows_are_read_from_compressed_files(tmp_path):
    rows = classification_rows(5)
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    assert load_rows(str(tmp_path / "rows.jsonl.gz")).to_list() == rows


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("missing.jsonl", None, FileNotFoundError, "does not exist"),
        ("rows.txt", b"x", ValueError, "unknown format"),
        ("rows.jsonl", b"{broken", ValueError, "could not be read as json"),
        ("rows.jsonl.gz", b"not gzip", ValueError, "could not be read as json"),
    ],
)
def test_unreadable_data_is_named(tmp_path, name, content, error, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=message):
        load_rows(str(tmp_path / name))


@pytest.mark.parametrize(
    ("columns", "task", "found"),
    [
        (["sentence", "label", "idx"], "classification", Fields(text=("sentence",), label="label")),
        (["sentence1", "sentence2", "label"], "classification", Fields(text=("sentence1", "sentence2"), label="label")),
        (["question", "answer"], "causal-lm", Fields(prompt="question", completion="answer")),
        (["text"], "causal-lm", Fields(text=("text",))),
    ],
)
def test_common_fields_are_found(columns, task, found):
    assert find_fields(columns, task, Fields()) == found


def test_unknown_fields_are_listed():
    with pytest.raises(ValueError, match=r"\['body', 'label'\].*--text-fields"):
        find_fields(["body", "label"], "classification", Fields())
    with pytest.raises(ValueError, match="--prompt-field"):
        find_fields(["body"], "causal-lm", Fields(prompt="nothing", completion="body"))


def test_prompts_are_not_trained_on(tmp_path):
    from transformers import AutoTokenizer

    save_language_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    rows = [{"prompt": "the cat", "completion": "sat on"}, {"prompt": "a a a a a a a a a a", "completion": "dog"}]
    data = load_rows(write_rows(tmp_path / "rows.jsonl", rows))
    (row,) = encode(data, tokenizer, "causal-lm", Fields(prompt="prompt", completion="completion"), max_length=10)
    assert row["labels"][:2] == [-100, -100]
    assert tokenizer.decode(row["labels"][2:]) == "sat on [EOS]"
    assert tokenizer.decode(row["input_ids"]) == "the cat sat on [EOS]"


# Files


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    replace_file(path, "old")
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        with open(temporary, "w") as file:
            file.write("half")
        raise RuntimeError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


# Command


def test_the_command_trains_informs_and_exports(tmp_path, capsys):
    run = settings(tmp_path)
    arguments = [
        "finetune",
        "--model",
        run.model,
        "--data",
        run.data,
        "--task",
        "classification",
        "--output",
        run.output,
    ]
    arguments += ["--r", "2", "--max-steps", "12", "--learning-rate", "1e-2", "--scaling-interval", "3"]
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 12
    assert main(["info", run.output]) == 0
    assert "mean effective rank" in capsys.readouterr().out
    assert main(["export", run.output, str(tmp_path / "plain")]) == 0
    assert type(PeftConfig.from_pretrained(tmp_path / "plain")) is LoraConfig
    assert "relative error 0 over" in capsys.readouterr().out


def test_the_command_prints_errors_in_one_line(tmp_path, capsys):
    assert main(["info", str(tmp_path)]) == 1
    assert "adapter_config.json" in capsys.readouterr().err
    assert main(["finetune", "--model", "m", "--data", "x", "--output", "o", "--task", "other"]) == 1
    assert "task='other' must be one of" in capsys.readouterr().err
    assert main(["finetune"]) == 1
    assert "model, data, task, output missing" in capsys.readouterr().err
