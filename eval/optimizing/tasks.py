"""What a model is optimized for: rows to train on, rows to be scored on, and how."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, DataCollatorWithPadding

from eval import glue
from eval.commonsense import score_by_likelihood, summary
from eval.harness.record import short_hash
from eval.harness.rows import split_dev
from eval.tasks import commonsense
from peft_scalora.finetuning.prompts import IGNORED_LABEL, load_tokenizer

BATCH, CHOICES_BATCH = 32, 8
COMMONSENSE = "commonsense"


@dataclass(frozen=True)
class Score:
    """Quality on some rows; `hash` is of every number that it was made of, so equal means equal to the last bit."""

    metrics: dict[str, float]
    predictions: list[float]
    hash: str


@dataclass(frozen=True)
class Task:
    """Encoded rows, their records, and what is made of them.

    Attributes:
        metric: the name of the primary metric, higher is better.
        train, test: encoded rows; those of `test` for measuring times and memory.
        fresh: the pretrained model, ready to be fine-tuned, in a dtype.
        score: quality of a model on "dev" or "test".
    """

    name: str
    metric: str
    train: list[dict]
    test: list[dict]
    data: dict
    collator: Callable
    fresh: Callable[[torch.dtype], nn.Module]
    score: Callable[[nn.Module, str], Score]

    def batch(self, rows: Sequence[dict]) -> dict[str, Tensor]:
        return dict(self.collator(list(rows)))


@dataclass(frozen=True)
class TaskSettings:
    """Which rows of which task; enough to have the same task in another process.

    `train_rows`, `dev_rows` and `test_rows` are totals; of the commonsense tasks, each gives as many.
    """

    model: str
    task: str = "sst2"
    data_dir: str | None = None
    max_length: int = 128
    train_rows: int | None = None
    dev_rows: int = 200
    test_rows: int | None = None


def load_task(settings: TaskSettings) -> Task:
    """Return the encoded task.

    Raises:
        ValueError: no such task. DataError: names file, row and field.
    """
    if settings.task not in (*glue.TASKS, COMMONSENSE):
        raise ValueError(f"task={settings.task!r} must be one of {', '.join(glue.TASKS)}, {COMMONSENSE}.")
    make = _commonsense if settings.task == COMMONSENSE else _classification
    return make(settings, load_tokenizer(settings.model))


def _classification(settings: TaskSettings, tokenizer) -> Task:
    name = settings.task
    train, dev = split_dev(glue.load_rows(name, "train", settings.data_dir), settings.dev_rows, settings.train_rows)
    test = glue.load_rows(name, "validation", settings.data_dir).part(0, settings.test_rows)
    rows = {"train": train, "dev": dev, "test": test}
    encoded = {part: glue.encode(found, name, tokenizer, settings.max_length) for part, found in rows.items()}
    collator = DataCollatorWithPadding(tokenizer)

    def score(model: nn.Module, part: str) -> Score:
        logits = glue.logits(model, encoded[part], collator, BATCH)
        predictions, labels = glue.predictions(logits), [row["labels"] for row in encoded[part]]
        metrics = glue.score(name, predictions, labels)
        if glue.TASKS[name].classes > 1:
            metrics["loss"] = float(F.cross_entropy(torch.tensor(logits).double(), torch.tensor(labels)))
        return Score(metrics, predictions.tolist(), short_hash(logits.tolist()))

    return Task(
        name=f"glue/{name}",
        metric=glue.TASKS[name].metric,
        train=encoded["train"],
        test=encoded["test"],
        data={part: found.record for part, found in rows.items()},
        collator=collator,
        fresh=lambda dtype: glue.load_classifier(name, settings.model, tokenizer, dtype),
        score=score,
    )


def _commonsense(settings: TaskSettings, tokenizer) -> Task:
    """Return the task scored by log-likelihood of the right answers, nats a token, and by how often it is highest."""
    names = list(commonsense.TASKS)
    train, dev = commonsense.load_mixture(names, settings.data_dir, settings.train_rows, settings.dev_rows)
    share = None if settings.test_rows is None else settings.test_rows // len(names)
    test = [commonsense.load_rows(name, "test", settings.data_dir).part(0, share) for name in names]
    rows = {"train": train, "dev": dev, "test": test}
    joined = {part: [row for rows in found for row in rows] for part, found in rows.items()}
    encoded = commonsense.encode(joined["train"], tokenizer, settings.max_length)
    random.Random(0).shuffle(encoded)

    def score(model: nn.Module, part: str) -> Score:
        with torch.no_grad():
            scores = score_by_likelihood(model, tokenizer, joined[part], CHOICES_BATCH, part)
        metrics = summary(scores)
        loss = [score.loss for score in scores]
        return Score(
            {"log_likelihood": -metrics["answer_loss"], "accuracy": metrics["accuracy"]},
            loss,
            short_hash(loss),
        )

    return Task(
        name=COMMONSENSE,
        metric="log_likelihood",
        train=encoded,
        test=commonsense.encode(joined["test"], tokenizer, settings.max_length),
        data={part: [rows.record for rows in found] for part, found in rows.items()},
        collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED_LABEL),
        fresh=lambda dtype: AutoModelForCausalLM.from_pretrained(settings.model, dtype=dtype),
        score=score,
    )
