"""What a model is optimized for: rows to train on, rows to be scored on, and how."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import glue
import numpy as np
import torch
from harness.rows import split_dev
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

BATCH = 32


@dataclass(frozen=True)
class Score:
    """Quality on the evaluation rows; `sha256` is of every number the model gave out, so equal means equal bits."""

    metrics: dict[str, float]
    predictions: list[float]
    sha256: str


@dataclass(frozen=True)
class Task:
    """Encoded rows, their records, and what is made of them.

    Attributes:
        metric: the name of the primary metric, higher is better.
        fresh: the pretrained model, ready to be fine-tuned; takes the dtype.
        score: quality of a model on some of the rows.
    """

    name: str
    metric: str
    train: list[dict]
    dev: list[dict]
    test: list[dict]
    data: dict
    collator: Callable
    fresh: Callable[[torch.dtype], nn.Module]
    score: Callable[[nn.Module, Sequence[dict]], Score]

    def batch(self, rows: Sequence[dict]) -> dict:
        return dict(self.collator(list(rows)))


@dataclass(frozen=True)
class TaskSettings:
    """Which rows of which task; enough to have the same task in another process."""

    model: str
    task: str = "sst2"
    data_dir: str | None = None
    max_length: int = 128
    train_rows: int | None = None
    dev_rows: int = 200
    test_rows: int | None = None


def load_task(settings: TaskSettings) -> Task:
    """
    Raises:
        ValueError: no such task. DataError: names file, row and field.
    """
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    if settings.task not in glue.TASKS:
        raise ValueError(f"task={settings.task!r} must be one of {', '.join(glue.TASKS)}.")
    return _classification(settings, tokenizer)


def _classification(settings: TaskSettings, tokenizer) -> Task:
    name = settings.task
    train, dev = split_dev(glue.load_rows(name, "train", settings.data_dir), settings.dev_rows, settings.train_rows)
    test = glue.load_rows(name, "validation", settings.data_dir).part(0, settings.test_rows)
    collator = DataCollatorWithPadding(tokenizer)

    def fresh(dtype: torch.dtype) -> nn.Module:
        model = AutoModelForSequenceClassification.from_pretrained(
            settings.model, num_labels=glue.TASKS[name].classes, dtype=dtype
        )
        model.config.pad_token_id = tokenizer.pad_token_id
        return model

    def score(model: nn.Module, rows: Sequence[dict]) -> Score:
        logits = class_logits(model, rows, collator)
        predictions = (logits.argmax(-1) if logits.shape[1] > 1 else logits[:, 0]).double().numpy()
        metrics = glue.score(name, predictions, rows)
        if logits.shape[1] > 1:
            metrics["loss"] = float(F.cross_entropy(logits.double(), torch.tensor([row["labels"] for row in rows])))
        return Score(metrics, predictions.tolist(), sha256(logits))

    return Task(
        name=f"glue/{name}",
        metric=glue.TASKS[name].metric,
        **{
            part: glue.encode(rows, name, tokenizer, settings.max_length)
            for part, rows in {"train": train, "dev": dev, "test": test}.items()
        },
        data={"train": train.record, "dev": dev.record, "test": test.record},
        collator=collator,
        fresh=fresh,
        score=score,
    )


@torch.no_grad()
def class_logits(model: nn.Module, rows: Sequence[dict], collator: Callable) -> Tensor:
    """Logits (row, class) in float32; rows of like length share a batch."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    found = []
    for start in range(0, len(order), BATCH):
        batch = collator([rows[i] for i in order[start : start + BATCH]])
        found.append(model(**{name: t.to(model.device) for name, t in batch.items()}).logits.float().cpu())
    logits = torch.cat(found)
    return logits[torch.tensor(np.argsort(order))]


def sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()
