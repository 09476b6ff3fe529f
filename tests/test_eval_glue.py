"""GLUE: metrics against formulas by hand, and whole runs on a tiny classifier."""

import gzip
import json
import os
import sys
from itertools import cycle
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from helpers_runs import WORDS, classification_rows, save_classifier, sentences
from transformers import DataCollatorWithPadding

from eval import glue
from eval.baselines import METHODS, prepare
from eval.harness.training import Training

EVAL = Path(__file__).parents[1] / "eval"
RNG = np.random.default_rng(0)
COLA, SST2 = (glue.Evaluation(task, dev_rows=10) for task in ("cola", "sst2"))


def confusion(predictions, references):
    pairs = list(zip(predictions, references))
    return [pairs.count(pair) for pair in ((1, 1), (1, 0), (0, 1), (0, 0))]


def by_hand(task, predictions, references):
    """The metrics, from their definitions."""
    if task == "stsb":
        # The mean rank of equal values.
        ranks = [
            [np.mean(np.flatnonzero(np.sort(v) == x)) for x in v] for v in map(np.array, (predictions, references))
        ]
        return {
            "pearson": np.corrcoef(predictions, references)[0, 1],
            "spearman": np.corrcoef(*ranks)[0, 1],
        }
    found = {"accuracy": sum(p == r for p, r in zip(predictions, references)) / len(references)}
    if task in ("cola", "mrpc", "qqp"):
        tp, fp, fn, tn = confusion(predictions, references)
        if task == "cola":
            return {"matthews": (tp * tn - fp * fn) / ((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)) ** 0.5}
        found["f1"] = 2 * tp / (2 * tp + fp + fn)
    return found


def outcomes(task):
    classes = glue.TASKS[task].classes
    if classes == 1:
        return RNG.normal(size=50).astype(np.float32), RNG.uniform(0, 5, size=50).astype(np.float32)
    return RNG.integers(0, classes, 50), RNG.integers(0, classes, 50)


@pytest.mark.parametrize("task", list(glue.TASKS))
def test_metrics_are_their_definitions(task):
    predictions, references = outcomes(task)
    expected = by_hand(task, predictions.tolist(), references.tolist())
    assert glue.score(task, predictions.astype(float), references) == pytest.approx(expected, abs=1e-6)
    module = evaluate.load(str(EVAL / "glue_metric"), task)
    assert module.compute(predictions=predictions, references=references) == pytest.approx(expected, abs=1e-6)


def test_a_model_that_always_says_the_same_has_no_correlation():
    assert glue.score("stsb", np.ones(4), np.arange(4.0)) == {"pearson": 0.0, "spearman": 0.0}
    assert glue.score("cola", np.ones(4), np.array([0, 1, 1, 0])) == {"matthews": 0.0}


def test_the_metric_module_names_its_tasks():
    with pytest.raises(ValueError, match=r"task='wnli' must be one of cola"):
        evaluate.load(str(EVAL / "glue_metric"), "wnli")


def write_task(folder, task, rows) -> str:
    (folder / "glue" / task).mkdir(parents=True)
    for split in ("train", glue.TASKS[task].validation):
        with gzip.open(folder / "glue" / task / f"{split}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return str(folder)


def task_rows(task, count=60):
    """Rows of any task: its text fields from word sequences, a label that the first word decides."""
    kinds = glue.TASKS[task]
    texts = [sentences(count), sentences(count)[::-1]]
    rows = []
    for i in range(count):
        number = WORDS.index(texts[0][i].split()[0])
        label = number % kinds.classes if kinds.classes > 1 else number / 3
        rows.append({name: texts[j][i] for j, name in enumerate(kinds.text)} | {"label": label})
    return rows


def settings(folder, **fields) -> Training:
    defaults = {
        "model": save_classifier(folder / "model"),
        "r": 2,
        "steps": 6,
        "batch_size": 8,
        "eval_steps": 3,
        "learning_rate": 1e-2,
    }
    return Training(**defaults | fields)


@pytest.mark.parametrize(("task", "method"), zip(glue.TASKS, cycle(["scalora", "lora", "full"])))
def test_every_task_runs_and_its_record_holds_the_metrics(tmp_path, task, method):
    data = write_task(tmp_path, task, task_rows(task))
    path = tmp_path / "run.json"
    evaluation = glue.Evaluation(task, train_rows=40, dev_rows=10)
    glue.run(evaluation, settings(tmp_path, method=method), data, str(path))
    saved = json.loads(path.read_text())
    assert saved["status"] == "finished" and saved["task"] == f"glue/{task}"
    assert [saved["data"][part]["rows"] for part in ("train", "dev", "test")] == [40, 10, 60]
    assert [point["step"] for point in saved["curve"]] == [3, 6] and len(saved["losses"]) == 6
    seconds = [second for _, second, _ in saved["losses"]]
    assert seconds == sorted(seconds) and saved["train_seconds"] > 0
    assert len(saved["predictions"]) == 60
    if len(set(saved["predictions"])) > 1:  # else no correlation, which has a test of its own
        assert saved["metrics"] == pytest.approx(by_hand(task, saved["predictions"], saved["references"]), abs=1e-6)
    assert not os.path.exists(f"{path}.checkpoints")


def test_predictions_do_not_depend_on_batches_or_order(tmp_path):
    rows = classification_rows(13)
    tokenizer, model = glue.load_model("cola", settings(tmp_path))
    encoded = glue.encode(rows, "cola", tokenizer, 32)
    model.eval()
    with torch.no_grad():
        one_by_one = [model(input_ids=torch.tensor([row["input_ids"]])).logits.argmax().item() for row in encoded]
        batched = glue.predict(model, encoded, DataCollatorWithPadding(tokenizer), batch_size=4)
    assert batched.tolist() == one_by_one and len(set(one_by_one)) == 2


@pytest.mark.parametrize("method", ["scalora", "full"])
def test_a_run_that_was_interrupted_continues_as_if_it_had_not_been(tmp_path, monkeypatch, method):
    data = write_task(tmp_path, "cola", task_rows("cola"))
    fields = settings(tmp_path, method=method, save_steps=2, scaling_interval=2)
    whole = glue.run(COLA, fields, data, str(tmp_path / "whole.json"))
    calls, score = [], glue.score

    def fails_once(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("the power went")
        return score(*arguments)

    monkeypatch.setattr(glue, "score", fails_once)
    broken = tmp_path / "broken.json"
    with pytest.raises(RuntimeError, match="the power went"):
        glue.run(COLA, fields, data, str(broken))
    failed = json.loads(broken.read_text())
    assert failed["status"] == "failed" and "the power went" in failed["error"]
    resumed = glue.run(COLA, fields, data, str(broken))
    assert [loss for _, _, loss in resumed["losses"]] == [loss for _, _, loss in whole["losses"]]
    assert resumed["predictions"] == whole["predictions"]
    seconds = [s for _, s, _ in resumed["losses"]]
    assert seconds == sorted(seconds)


def test_a_finished_run_is_not_repeated_and_another_is_not_overwritten(tmp_path, monkeypatch):
    data = write_task(tmp_path, "cola", task_rows("cola"))
    path = str(tmp_path / "run.json")
    first = glue.run(COLA, settings(tmp_path), data, path)
    monkeypatch.setattr(glue, "train", None)
    assert glue.run(COLA, settings(tmp_path), data, path) == json.loads(json.dumps(first))
    with pytest.raises(ValueError, match=r"\(learning_rate=0.01 there, 0.5 here\): choose another --output"):
        glue.run(COLA, settings(tmp_path, learning_rate=0.5), data, path)


def test_the_command(tmp_path, monkeypatch, capsys):
    data = write_task(tmp_path, "rte", task_rows("rte"))
    options = "--task rte --method lora --r 2 --steps 2 --dev-rows 10"
    command = f"x {options} --model {settings(tmp_path).model} --data-dir {data} --output {tmp_path}/rte.json"
    monkeypatch.setattr(sys, "argv", command.split())
    glue.main()
    saved = json.loads((tmp_path / "rte.json").read_text())
    assert saved["settings"]["model"] == "model" and saved["settings"]["r"] == 2
    assert capsys.readouterr().out.endswith(json.dumps(saved["metrics"], indent=1) + "\n")


@pytest.mark.parametrize("method", [name for name in METHODS if not name.startswith("q")])
def test_every_method_trains_the_head_in_float32(tmp_path, method):
    fields = settings(tmp_path, method=method, dtype="bfloat16", warmup_steps=0)
    tokenizer, model = glue.load_model("cola", fields)
    batches = [DataCollatorWithPadding(tokenizer)(glue.encode(task_rows("cola", 8), "cola", tokenizer, 32))]
    prepared = prepare(model, fields, batches).model
    head = [p for name, p in prepared.named_parameters() if "classifier" in name and p.requires_grad]
    assert len(head) == 2 and all(p.dtype == torch.float32 for p in head)
    prepared(**batches[0]).loss.backward()
    assert all(p.grad is not None for p in head)


def test_another_task_and_other_rows_are_another_run(tmp_path):
    data = write_task(tmp_path, "cola", task_rows("cola"))
    write_task(tmp_path, "sst2", task_rows("sst2"))
    path = str(tmp_path / "run.json")
    glue.run(COLA, settings(tmp_path), data, path)
    with pytest.raises(ValueError, match=r"other settings \(data, task='glue/cola' there, 'glue/sst2' here\)"):
        glue.run(SST2, settings(tmp_path), data, path)
    flipped = [row | {"label": 1 - row["label"]} for row in task_rows("cola")]
    with pytest.raises(ValueError, match=r"other settings \(data\)"):
        glue.run(COLA, settings(tmp_path), write_task(tmp_path / "flipped", "cola", flipped), path)


def test_unknown_tasks_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"task='wnli' must be one of cola, sst2"):
        glue.load_rows("wnli", "train", str(tmp_path))
