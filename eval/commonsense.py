"""Commonsense reasoning: joint fine-tuning on eight multiple-choice tasks, each scored; one run, one JSON.

    python -m eval.commonsense --model M --data-dir D --method scalora --learning-rate 1e-3 --output runs/M.json

Rows have the shape of LLM-Adapters (arXiv:2304.01933): instruction, input, output, answer. With --data-dir they are
`commonsense/TASK/{train,test}.jsonl.gz` below a folder; else the training mixture comes from the hub, the test files
from the LLM-Adapters repository. `--method none` scores the model as it is. The curve is of `dev` rows taken out of the
training rows; the metrics are of the test rows, scored once, at the end. A run that was interrupted continues.
"""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import DataCollatorForSeq2Seq

from eval.harness.generate import generate
from eval.harness.likelihood import Pair, check_length, chosen, chosen_by_length, encode_pair, log_likelihoods
from eval.harness.models import load_causal_lm
from eval.harness.once import run_command, run_once
from eval.harness.options import check_choices, check_counts, option, several
from eval.harness.ranks import over_ranks
from eval.harness.record import checkpoints, is_main_process, read, short_hash
from eval.harness.rows import Rows
from eval.harness.training import Training, settings_of, train
from eval.tasks.commonsense import OUTPUT, TASKS, choices, encode, load_mixture, load_rows, longest, prompt
from peft_scalora.files.atomic import replace_file
from peft_scalora.finetuning.prompts import IGNORED_LABEL

MAX_NEW_TOKENS = 32
MIXTURE_SEED = 0  # of the rows' order, the same for every run


@dataclass(frozen=True)
class Evaluation:
    """Everything that is trained on and scored, and how, apart from the training itself; all in the run's JSON."""

    tasks: list[str] = several(TASKS, "tasks to train on and to score", choices=tuple(TASKS))  # noqa: RUF009
    scoring: str = option("likelihood", "how an answer is chosen", choices=("likelihood", "generation"))
    train_rows: int | None = option(None, "in all, as many of every task; all rows unless given")
    dev_rows: int = option(400, "in all, taken out of the training rows")
    test_rows: int | None = option(None, "the first so many of every task; all unless given")
    eval_batch_size: int = option(16, "rows of a batch that is scored")

    def __post_init__(self):
        check_choices(self)
        check_counts(self, ("dev_rows", "test_rows", "eval_batch_size"))


@dataclass(frozen=True)
class Score:
    """The score of one row: 1 is right, 0 wrong; `by_length` and `loss` (nats, summed) are of likelihood scoring."""

    correct: int
    by_length: int | None = None
    loss: float | None = None
    tokens: int = 0


def score_by_likelihood(model, tokenizer, rows: Sequence[dict], batch_size: int, description: str) -> list[Score]:
    """Score rows by the most probable of their outputs; the loss is of the right output's tokens."""
    encoded = [[encode_pair(tokenizer, prompt(row), OUTPUT + choice) for choice in choices(row)] for row in rows]

    def share(encoded: Sequence[list[Pair]]) -> list[list[float]]:
        values = iter(log_likelihoods(model, [pair for pairs in encoded for pair in pairs], batch_size, description))
        return [[next(values) for _ in pairs] for pairs in encoded]

    scores = []
    for row, pairs, values in zip(rows, encoded, over_ranks(share, encoded), strict=True):
        right = choices(row).index(row["answer"])
        by_length = chosen_by_length(values, [OUTPUT + choice for choice in choices(row)])
        scores.append(
            Score(int(chosen(values) == right), int(by_length == right), -values[right], len(pairs[right][1]))
        )
    return scores


def extract_answer(task: str, text: str) -> str | None:
    """Return the first of the task's answers in a generated text, as LLM-Adapters looks for it."""
    found = re.search("|".join(TASKS[task]), text)
    return found[0] if found else None


def score_by_generation(model, tokenizer, rows: Sequence[dict], task: str, batch_size: int, folder: str) -> list[Score]:
    """Score rows by the first answer in the greedily generated text."""
    texts = generate(model, tokenizer, [prompt(row) for row in rows], MAX_NEW_TOKENS, batch_size, folder=folder)
    return [Score(int(extract_answer(task, text) == row["answer"])) for row, text in zip(rows, texts, strict=True)]


def summary(scores: Sequence[Score]) -> dict[str, float]:
    """Return the accuracy and, of likelihood scoring, accuracy by length and mean loss of the answers' tokens."""
    figures = {"accuracy": sum(s.correct for s in scores) / len(scores)}
    if scores[0].loss is not None:
        figures["accuracy_by_length"] = sum(s.by_length for s in scores) / len(scores)
        figures["answer_loss"] = sum(s.loss for s in scores) / sum(s.tokens for s in scores)
    return figures


def total(by_task: dict[str, list[Score]]) -> dict[str, float]:
    """Return the mean accuracy of the tasks, each one's, and the loss of all answers' tokens."""
    summaries = {task: summary(scores) for task, scores in by_task.items()}
    figures = summary([score for scores in by_task.values() for score in scores])
    for name in set(figures) - {"answer_loss"}:
        figures[name] = sum(s[name] for s in summaries.values()) / len(summaries)
    return figures | {f"{name}_{task}": s[name] for task, s in summaries.items() for name in sorted(s)}


def score_tasks(model, tokenizer, tests: dict[str, Rows], scoring: str, batch_size: int, folder: str) -> dict:
    """Return scores by task; a task that was scored before an interruption is read from `folder`."""
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, "scored.json")
    by_task = {}
    if os.path.exists(path):
        by_task = {task: [Score(**score) for score in scores] for task, scores in read(path).items()}
    for task, rows in tests.items():
        if task in by_task:
            continue
        if scoring == "likelihood":
            by_task[task] = score_by_likelihood(model, tokenizer, rows, batch_size, task)
        else:
            by_task[task] = score_by_generation(
                model, tokenizer, rows, task, batch_size, os.path.join(folder, f"texts-{task}")
            )
        if is_main_process():
            replace_file(path, json.dumps({task: [vars(s) for s in scores] for task, scores in by_task.items()}))
    return by_task


def fit(model, tokenizer, settings: Training, mixture: tuple[list[Rows], list[Rows]], batch_size: int, folder: str):
    """Train on the mixture, and return the trained model and the run's figures."""
    train_rows, dev_rows = ([row for part in parts for row in part] for parts in mixture)
    encoded = encode(train_rows, tokenizer, settings.max_length)
    random.Random(MIXTURE_SEED).shuffle(encoded)

    def dev_metrics(model) -> dict[str, float]:
        return summary(score_by_likelihood(model, tokenizer, dev_rows, batch_size, "dev"))

    collator = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED_LABEL)
    model, figures = train(settings, model, encoded, collator, dev_metrics, folder)
    return model, {"train_rows_left_out": len(train_rows) - len(encoded)} | figures


def run(
    evaluation: Evaluation, settings: Training, data_dir: str | None, output: str, keep_adapter: bool = False
) -> dict:
    """Train and score, and return the run; its JSON goes to `output`."""
    saved = settings_of(settings, **vars(evaluation) | {"tasks": list(evaluation.tasks)})
    tests = {task: load_rows(task, "test", data_dir).part(0, evaluation.test_rows) for task in evaluation.tasks}
    mixture = load_mixture(evaluation.tasks, data_dir, evaluation.train_rows, evaluation.dev_rows)
    parts = {"train": mixture[0], "dev": mixture[1], "test": tests.values()}
    data = {split: [rows.record for rows in part] for split, part in parts.items()}

    def make(result: dict):
        return _train_and_score(evaluation, settings, mixture, tests, checkpoints(output), result)

    return run_once(output, "commonsense", saved, data, make, keep_adapter)


def _train_and_score(evaluation: Evaluation, settings: Training, mixture, tests, folder: str, result: dict):
    result |= {"metric": "accuracy", "dev_metric": "answer_loss"}
    tokenizer, model = load_causal_lm(settings)
    check_length(model, longest([*mixture[1], *tests.values()], tokenizer))  # before hours of training
    model, figures = fit(model, tokenizer, settings, mixture, evaluation.eval_batch_size, folder)
    result |= figures
    # What an interrupted run has scored counts if it was of exactly this model: one with these dev metrics.
    last = {name: value for name, value in figures["curve"][-1].items() if name != "seconds"}
    folder = os.path.join(folder, f"scored-{short_hash(last)}")
    with torch.no_grad():
        by_task = score_tasks(model.eval(), tokenizer, tests, evaluation.scoring, evaluation.eval_batch_size, folder)
    result["metrics"] = total(by_task)
    result["predictions"] = [score.correct for scores in by_task.values() for score in scores]
    result["prediction_tasks"] = [task for task, scores in by_task.items() for _ in scores]
    return model


def main() -> None:
    run_command(__doc__, Evaluation, run, max_length=512)


if __name__ == "__main__":
    main()
