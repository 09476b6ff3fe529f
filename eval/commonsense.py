"""Commonsense reasoning: joint fine-tuning on eight multiple-choice tasks, each scored; one run, one JSON.

    python -m eval.commonsense --model M --data-dir D --method scalora --learning-rate 1e-3 --output runs/M.json

Rows have the shape of LLM-Adapters (arXiv:2304.01933): instruction, input, output, answer. With --data-dir they are
`commonsense/TASK/{train,test}.jsonl.gz` below a folder; else the training mixture comes from the hub, the test files
from the LLM-Adapters repository. `--method none` scores the model as it is. The curve is of `dev` rows taken out of the
training rows; the metrics are of the test rows, scored once, at the end. A run that was interrupted continues.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from transformers import DataCollatorForSeq2Seq

from eval.harness.generate import generate
from eval.harness.likelihood import Pair, check_length, chosen, chosen_by_length, encode_pair, log_likelihoods
from eval.harness.models import load_causal_lm
from eval.harness.once import run_once
from eval.harness.prompts import with_labels
from eval.harness.ranks import over_ranks
from eval.harness.record import checkpoints, is_main_process, short_hash
from eval.harness.rows import DataError, Field, Rows, Source, load, split_dev
from eval.harness.training import Training, add_arguments, check_counts, from_arguments, settings_of, train
from peft_scalora.files.atomic import replace_file
from peft_scalora.finetuning.data import IGNORED_LABEL

TASKS = {  # and the answers that occur in each; a row names its own in its instruction
    "boolq": ("true", "false"),
    "piqa": ("solution1", "solution2"),
    "social_i_qa": ("answer1", "answer2", "answer3"),
    "hellaswag": ("ending1", "ending2", "ending3", "ending4"),
    "winogrande": ("option1", "option2"),
    "ARC-Easy": ("answer1", "answer2", "answer3", "answer4", "answer5"),
    "ARC-Challenge": ("answer1", "answer2", "answer3", "answer4", "answer5"),
    "openbookqa": ("answer1", "answer2", "answer3", "answer4"),
}
MIXTURE = "mixture"
MIXTURE_HUB = "zwhe99/commonsense_170k"
TEST_URL = "https://raw.githubusercontent.com/AGI-Edgerunners/LLM-Adapters/main/dataset/{task}/test.json"
OUTPUT = "the correct answer is "
TEMPLATE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
SCORINGS = ("likelihood", "generation")
MAX_NEW_TOKENS = 32
MIXTURE_SEED = 0  # of the rows' order, the same for every run


@dataclass(frozen=True)
class Score:
    """What one row came to: 1 is right, 0 wrong; `by_length` and `loss` (nats, summed) are of likelihood scoring."""

    correct: int
    by_length: int | None = None
    loss: float | None = None
    tokens: int = 0


def prompt(row: dict) -> str:
    return TEMPLATE.format(instruction=row["instruction"])


def choices(row: dict) -> list[str]:
    """The answers that the instruction allows; none if it does not say."""
    found = re.search(r"Answer format:\s*(\S+)\s*$", row["instruction"])
    return found[1].split("/") if found else []


def load_rows(task: str, split: str, data_dir: str | None) -> Rows:
    """All rows of a task's split, "train" or "test", or of the whole training mixture, which only the hub has.

    Raises:
        ValueError: no such task. DataError: names file, row and field.
    """
    if task not in (*TASKS, MIXTURE):
        raise ValueError(f"task={task!r} must be one of {', '.join(TASKS)}.")
    hub = MIXTURE_HUB if split == "train" else TEST_URL.format(task=task)
    source = Source(f"commonsense/{task}/{split}.jsonl.gz", hub, split=split)
    fields = {name: Field(str) for name in ("instruction", "output", "answer")} | {
        "input": Field(str, may_be_empty=True)
    }
    rows = load(source, data_dir, fields)
    allowed = {answer for name in TASKS if task in (name, MIXTURE) for answer in TASKS[name]}
    for number, row in enumerate(rows, 1):
        complaint = _complaint(row, allowed)
        if complaint:
            raise DataError(f"{rows.source}, row {number}: field {complaint}.")
    return rows


def _complaint(row: dict, allowed: set[str]) -> str | None:
    found = choices(row)
    if not found:
        return "'instruction' does not end with the choices ('Answer format: first/second')"
    if not set(found) <= allowed:
        return f"'instruction' has the choices {'/'.join(found)}, and the task's are {', '.join(sorted(allowed))}"
    if row["answer"] not in found:
        return f"'answer' is {row['answer']!r}, not one of the row's choices {'/'.join(found)}"
    if row["output"] != OUTPUT + row["answer"]:
        return f"'output' is {row['output']!r}, not {OUTPUT + row['answer']!r}"
    if row["input"]:
        return "'input' is not empty, and the prompt has no place for it"
    return None


def load_mixture(
    tasks: Sequence[str], data_dir: str | None, train_rows: int | None, dev_rows: int
) -> tuple[list[Rows], list[Rows]]:
    """Training rows and dev rows, by part: one a task from a folder, and one for all from the hub.

    `train_rows` and `dev_rows` are totals; every part gives as many (rounded down), the same ones in every run.

    Raises:
        ValueError: a part has not got so many rows, or the hub's mixture was asked for some tasks only.
    """
    if data_dir is None and set(tasks) != set(TASKS):
        raise ValueError(f"tasks={','.join(tasks)}: the hub's mixture is of all tasks; give --data-dir to choose some.")
    parts = tasks if data_dir is not None else [MIXTURE]
    train_share, dev_share = (None if total is None else total // len(parts) for total in (train_rows, dev_rows))
    if dev_share == 0:
        raise ValueError(f"dev_rows={dev_rows} gives no row of each of {len(parts)} parts: raise it.")
    split = [split_dev(load_rows(part, "train", data_dir), dev_share) for part in parts]
    for part, (train_part, _) in zip(parts, split, strict=True):
        if train_share is not None and not 0 < train_share <= len(train_part):
            raise ValueError(
                f"train_rows={train_rows} is {train_share} rows of each of {len(parts)} parts, and {part} has "
                f"{len(train_part)}: choose another number, or none to use all rows."
            )
    return [train_part.part(0, train_share) for train_part, _ in split], [dev_part for _, dev_part in split]


def encode(rows: Sequence[dict], tokenizer, max_length: int) -> list[dict]:
    """Token ids of prompt, output and EOS, labels on the latter two; rows longer than `max_length` are left out."""
    pairs = (encode_pair(tokenizer, prompt(row), row["output"]) for row in rows)
    encoded = [with_labels(*pair, tokenizer, max_length) for pair in pairs]
    encoded = [row for row in encoded if row is not None]
    if not encoded:
        raise ValueError(f"no training row fits into max_length={max_length} tokens: raise it.")
    return encoded


def longest(parts: Iterable[Rows], tokenizer) -> int:
    """Tokens of the longest prompt with a choice, less the last one."""
    pairs = (
        encode_pair(tokenizer, prompt(row), OUTPUT + choice)
        for rows in parts
        for row in rows
        for choice in choices(row)
    )
    return max(len(context) + len(continuation) for context, continuation in pairs) - 1


def score_by_likelihood(model, tokenizer, rows: Sequence[dict], batch_size: int, description: str) -> list[Score]:
    """The most probable of the row's outputs counts; the loss is of the right output's tokens."""
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
    """The first of the task's answers in a generated text, as LLM-Adapters looks for it."""
    found = re.search("|".join(TASKS[task]), text)
    return found[0] if found else None


def score_by_generation(model, tokenizer, rows: Sequence[dict], task: str, batch_size: int, folder: str) -> list[Score]:
    """The first answer in the greedily generated text counts."""
    texts = generate(model, tokenizer, [prompt(row) for row in rows], MAX_NEW_TOKENS, batch_size, folder=folder)
    return [Score(int(extract_answer(task, text) == row["answer"])) for row, text in zip(rows, texts, strict=True)]


def summary(scores: Sequence[Score]) -> dict[str, float]:
    """Accuracy, and of likelihood scoring the accuracy by length and the mean loss of the answers' tokens."""
    figures = {"accuracy": sum(s.correct for s in scores) / len(scores)}
    if scores[0].loss is not None:
        figures["accuracy_by_length"] = sum(s.by_length for s in scores) / len(scores)
        figures["answer_loss"] = sum(s.loss for s in scores) / sum(s.tokens for s in scores)
    return figures


def total(by_task: dict[str, list[Score]]) -> dict[str, float]:
    """The mean accuracy of the tasks, each one's, and the loss of all answers' tokens."""
    summaries = {task: summary(scores) for task, scores in by_task.items()}
    figures = summary([score for scores in by_task.values() for score in scores])
    for name in set(figures) - {"answer_loss"}:
        figures[name] = sum(s[name] for s in summaries.values()) / len(summaries)
    return figures | {f"{name}_{task}": s[name] for task, s in summaries.items() for name in sorted(s)}


def score_tasks(model, tokenizer, tests: dict[str, Rows], scoring: str, batch_size: int, folder: str) -> dict:
    """Scores by task; a task that was scored before an interruption is read from `folder`."""
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, "scored.json")
    by_task = {}
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            by_task = {task: [Score(**score) for score in scores] for task, scores in json.load(file).items()}
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
    """Train on the mixture; the trained model and the run's figures."""
    train_rows, dev_rows = ([row for part in parts for row in part] for parts in mixture)
    encoded = encode(train_rows, tokenizer, settings.max_length)
    random.Random(MIXTURE_SEED).shuffle(encoded)

    def dev_metrics(model) -> dict[str, float]:
        return summary(score_by_likelihood(model, tokenizer, dev_rows, batch_size, "dev"))

    collator = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED_LABEL)
    model, figures = train(settings, model, encoded, collator, dev_metrics, folder)
    return model, {"train_rows_left_out": len(train_rows) - len(encoded)} | figures


@dataclass(frozen=True)
class Evaluation:
    """What is trained on and scored, and how, apart from the training itself; all of it is in the run's JSON."""

    tasks: tuple[str, ...] = tuple(TASKS)
    scoring: str = "likelihood"
    train_rows: int | None = None
    dev_rows: int = 400
    test_rows: int | None = None
    eval_batch_size: int = 16

    def __post_init__(self):
        for task in self.tasks:
            if task not in TASKS:
                raise ValueError(f"task={task!r} must be one of {', '.join(TASKS)}.")
        if self.scoring not in SCORINGS:
            raise ValueError(f"scoring={self.scoring!r} must be one of {', '.join(SCORINGS)}.")
        check_counts(self, ("dev_rows", "test_rows", "eval_batch_size"))


def run(
    evaluation: Evaluation, settings: Training, data_dir: str | None, output: str, keep_adapter: bool = False
) -> dict:
    """Train and score; the run's JSON goes to `output`."""
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", help="folder with commonsense/TASK/SPLIT.jsonl.gz; the hub unless given")
    parser.add_argument("--tasks", default=",".join(TASKS), help="separated by commas; all eight unless given")
    parser.add_argument("--train-rows", type=int, help="in all, as many of every task; all rows unless given")
    parser.add_argument("--dev-rows", type=int, default=400, help="in all, taken out of the training rows")
    parser.add_argument("--test-rows", type=int, help="the first so many of every task; all unless given")
    parser.add_argument("--scoring", default="likelihood", choices=SCORINGS)
    parser.add_argument("--eval-batch-size", type=int, default=16)
    parser.add_argument("--output", required=True, help="the run's JSON")
    add_arguments(parser)
    parser.set_defaults(max_length=512)
    arguments = parser.parse_args()
    evaluation = Evaluation(
        tasks=tuple(arguments.tasks.split(",")),
        scoring=arguments.scoring,
        train_rows=arguments.train_rows,
        dev_rows=arguments.dev_rows,
        test_rows=arguments.test_rows,
        eval_batch_size=arguments.eval_batch_size,
    )
    result = run(evaluation, from_arguments(arguments), arguments.data_dir, arguments.output, arguments.save_adapter)
    if is_main_process():
        print(json.dumps(result["metrics"], indent=1))


if __name__ == "__main__":
    main()
