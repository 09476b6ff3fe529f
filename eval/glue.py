"""GLUE: one task, one method, one seed, one JSON.

    python -m eval.glue --model MINILM --task cola --method scalora --learning-rate 1e-3 --output runs/cola.json

Data come from the hub (nyu-mll/glue), or with --data-dir from `glue/TASK/{train,validation}.jsonl.gz` below a folder.
The curve is of `dev` rows taken out of the training rows; the metrics are of the validation rows, scored once, at the
end. `accelerate launch` spreads training and scoring. A run that was interrupted continues; one that is finished is not
repeated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, set_seed

from eval.baselines.mora import HEADS
from eval.glue_metric.scores import scores
from eval.harness.models import quantization_config
from eval.harness.once import run_command, run_once
from eval.harness.options import option
from eval.harness.ranks import over_ranks
from eval.harness.record import checkpoints
from eval.harness.rows import Field, Rows, Source, load, split_dev
from eval.harness.training import DTYPES, Training, settings_of, train
from peft_scalora.finetuning.prompts import load_tokenizer


@dataclass(frozen=True)
class Task:
    """The text fields of a task, its number of classes (1: a score), its main metric and its validation file."""

    text: tuple[str, ...]
    classes: int = 2
    metric: str = "accuracy"
    validation: str = "validation"
    may_be_empty: bool = False  # a text

    @property
    def fields(self) -> dict[str, Field]:
        label = Field(float) if self.classes == 1 else Field(int, tuple(range(self.classes)))
        return {**{name: Field(str, may_be_empty=self.may_be_empty) for name in self.text}, "label": label}


TASKS = {
    "cola": Task(("sentence",), metric="matthews"),
    "sst2": Task(("sentence",)),
    "mrpc": Task(("sentence1", "sentence2"), metric="f1"),
    "stsb": Task(("sentence1", "sentence2"), classes=1, metric="pearson"),
    "qqp": Task(("question1", "question2"), metric="f1", may_be_empty=True),  # the hub has two such rows
    "mnli": Task(("premise", "hypothesis"), classes=3, validation="validation_matched"),
    "qnli": Task(("question", "sentence")),
    "rte": Task(("sentence1", "sentence2")),
}


def load_rows(task: str, split: str, data_dir: str | None) -> Rows:
    """Return all rows of a split, "train" or "validation".

    Raises:
        ValueError: no such task. DataError: names file, row and field.
    """
    if task not in TASKS:
        raise ValueError(f"task={task!r} must be one of {', '.join(TASKS)}.")
    split = split if split == "train" else TASKS[task].validation
    source = Source(f"glue/{task}/{split}.jsonl.gz", "nyu-mll/glue", task, split)
    return load(source, data_dir, TASKS[task].fields)


def encode(rows: Rows, task: str, tokenizer, max_length: int) -> list[dict]:
    """Return token ids and label of every row, cut at `max_length`."""
    texts = [[row[name] for row in rows] for name in TASKS[task].text]
    encoded = tokenizer(*texts, truncation=True, max_length=max_length)
    kind = float if TASKS[task].classes == 1 else int
    labels = [kind(row["label"]) for row in rows]
    return [{name: encoded[name][i] for name in encoded} | {"labels": labels[i]} for i in range(len(rows))]


@torch.no_grad()
def logits(model, encoded: Sequence[dict], collator, batch_size: int) -> np.ndarray:
    """Return logits (row, class) in float32; rows of like length share a batch."""

    def outputs(order: Sequence[int]) -> list[list[float]]:
        found = []
        for start in range(0, len(order), batch_size):
            batch = collator([encoded[i] for i in order[start : start + batch_size]])
            found += model(**batch.to(model.device)).logits.float().tolist()
        return found

    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]["input_ids"]))
    found = np.array(over_ranks(outputs, order), dtype=np.float32)
    return found[np.argsort(order)]


def predictions(logits: np.ndarray) -> np.ndarray:
    """Return the class of every row of logits (row, class), or its score where there is one output."""
    return (logits[:, 0] if logits.shape[1] == 1 else logits.argmax(-1)).astype(float)


def predict(model, encoded: Sequence[dict], collator, batch_size: int) -> np.ndarray:
    """Return the `predictions` of the model's logits."""
    return predictions(logits(model, encoded, collator, batch_size))


def score(task: str, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
    """Return the metrics that GLUE reports; a model that predicts one value only has no correlation: 0."""
    if TASKS[task].classes > 1:
        predictions = predictions.astype(int)
    elif np.ptp(predictions) == 0:
        return {"pearson": 0.0, "spearman": 0.0}
    return scores(task, predictions, references)


def load_model(task: str, settings: Training):
    """Return tokenizer and classifier; the head's weights are drawn with the run's seed."""
    set_seed(settings.seed)
    tokenizer = load_tokenizer(settings.model)
    quantization = quantization_config(settings.method, settings.dtype)
    model = load_classifier(task, settings.model, tokenizer, DTYPES[settings.dtype], quantization)
    return tokenizer, head_in(torch.float32, model)


def load_classifier(task: str, folder: str, tokenizer, dtype: torch.dtype, quantization_config=None):
    """Return the model in `dtype`; its head is drawn where it has none for the task's classes."""
    model = AutoModelForSequenceClassification.from_pretrained(
        folder,
        num_labels=TASKS[task].classes,
        dtype=dtype,
        quantization_config=quantization_config,
        ignore_mismatched_sizes=True,  # a head for other classes is replaced, and transformers says so
    )
    model.config.pad_token_id = tokenizer.pad_token_id
    return model


def head_in(dtype: torch.dtype, model):
    """Give a classifier's head `dtype`, whatever the rest is in: every method trains it, in float32."""
    for name in HEADS:
        if hasattr(model, name):
            head = getattr(model, name).to(dtype)
            head.register_forward_pre_hook(_in_own_dtype)
    return model


def _in_own_dtype(module: torch.nn.Module, inputs: tuple) -> tuple:
    return (inputs[0].to(next(module.parameters()).dtype), *inputs[1:])


@dataclass(frozen=True)
class Evaluation:
    """The task, and which of its rows are used."""

    task: str = option(help="the GLUE task", choices=tuple(TASKS))
    train_rows: int | None = option(None, "use the first so many; all unless given")
    dev_rows: int = option(400, "taken out of the training rows")


def run(
    evaluation: Evaluation, settings: Training, data_dir: str | None, output: str, keep_adapter: bool = False
) -> dict:
    """Train and score, and return the run; its JSON goes to `output`."""
    task = evaluation.task
    sizes = {"dev_rows": evaluation.dev_rows, "train_rows": evaluation.train_rows}
    train_rows, dev_rows = split_dev(load_rows(task, "train", data_dir), **sizes)
    parts = {"train": train_rows, "dev": dev_rows, "test": load_rows(task, "validation", data_dir)}
    data = {name: part.record for name, part in parts.items()}

    def make(result: dict):
        return _train_and_score(task, settings, parts, checkpoints(output), result)

    return run_once(output, f"glue/{task}", settings_of(settings, **sizes), data, make, keep_adapter)


def _train_and_score(task: str, settings: Training, parts: dict[str, Rows], folder: str, result: dict):
    result["metric"] = result["dev_metric"] = TASKS[task].metric
    tokenizer, model = load_model(task, settings)
    encoded = {name: encode(part, task, tokenizer, settings.max_length) for name, part in parts.items()}
    labels = {name: np.array([row["labels"] for row in part]) for name, part in encoded.items()}
    collator = DataCollatorWithPadding(tokenizer)

    def dev_metrics(model) -> dict[str, float]:
        return score(task, predict(model, encoded["dev"], collator, 64), labels["dev"])

    model, figures = train(settings, model, encoded["train"], collator, dev_metrics, folder)
    predictions = predict(model.eval(), encoded["test"], collator, 64)
    result |= figures
    result["metrics"] = score(task, predictions, labels["test"])
    result["predictions"] = predictions.tolist()
    result["references"] = labels["test"].tolist()
    return model


def main() -> None:
    run_command(__doc__, Evaluation, run)


if __name__ == "__main__":
    main()
