r"""Word problems: train a language model on GSM8K, MATH or MetaMathQA, test it on GSM8K and MATH; one run, one JSON.

    python -m eval.math_problems --model M --data-dir D --train gsm8k math --method scalora --output runs/M.json

Rows come from the hub, or with --data-dir from `gsm8k/{train,test}.jsonl.gz`, `math/{train,test}.jsonl.gz` and
`metamathqa/train.jsonl.gz` below a folder; --train also takes JSONL files with MetaMathQA's fields, query and response.
`--method none` scores the model as it is. The curve is the loss of `dev` rows taken out of the training rows. The
metrics are of the test rows, scored once, at the end: the loss of the given solution (mean over rows of the mean over
its tokens) and, unless --no-generate, the share of generated solutions whose final answer is right, read strictly
(`#### NUMBER`, `\boxed{}`) and flexibly (see harness/answers.py). A run that was interrupted continues. `accelerate
launch` spreads training, scoring and generation.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import fmean

from tqdm.auto import tqdm
from transformers import DataCollatorForSeq2Seq

from eval.harness.answers import MathVerify
from eval.harness.generate import generate
from eval.harness.likelihood import check_length
from eval.harness.loss import answer_loss
from eval.harness.models import load_causal_lm
from eval.harness.once import run_command, run_once
from eval.harness.options import check_counts, option, several
from eval.harness.record import checkpoints, is_main_process, short_hash
from eval.harness.rows import Rows
from eval.harness.training import Training, settings_of, train
from eval.tasks.math_problems import SETS, TESTS, encode_rows, judge, load_mixture, load_test, prompt
from peft_scalora.finetuning.prompts import IGNORED_LABEL

STOP = ("### Instruction:",)  # a model that was not trained goes on with a problem of its own
FILE_ENDS = (".jsonl", ".jsonl.gz")


@dataclass(frozen=True)
class Evaluation:
    """Everything that is trained on and scored, and how, apart from the training itself; all in the run's JSON."""

    train: list[str] = several(["gsm8k"], f"data sets of {', '.join(SETS)}, or JSONL files")  # noqa: RUF009
    train_rows: int | None = option(None, "use so many; all unless given")
    dev_rows: int = option(400, "taken out of the training rows")
    test_rows: int | None = option(None, "so many of each test set; all unless given")
    generate: bool = option(True, "generate solutions; without, the metric is the loss")
    max_new_tokens: int = option(512, "tokens of a generated solution")
    eval_batch_size: int = option(16, "rows of a batch that is scored")

    def __post_init__(self):
        for name in self.train:
            if name not in SETS and not name.endswith(FILE_ENDS):
                raise ValueError(f"train={name!r} must be one of {', '.join(SETS)}, or a .jsonl or .jsonl.gz file.")
        check_counts(self, ("dev_rows", "test_rows", "max_new_tokens", "eval_batch_size"))

    @property
    def saved(self) -> dict:
        """Return the fields as the run's JSON has them: of files the names alone."""
        return vars(self) | {"train": [os.path.basename(name) for name in self.train]}


def longest(tests: dict[str, Rows], tokenizer, evaluation: Evaluation) -> int:
    """Return the tokens of the longest test row, or prompt with what may be generated, less the last one."""
    encoded = list(chain.from_iterable(encode_rows(rows, tokenizer)[0] for rows in tests.values()))
    lengths = [len(row["input_ids"]) for row in encoded]
    if evaluation.generate:
        lengths += [row["labels"].count(IGNORED_LABEL) + evaluation.max_new_tokens for row in encoded]
    return max(lengths) - 1


def fit(model, tokenizer, settings: Training, mixture: tuple[Rows, Rows], batch_size: int, folder: str):
    """Train on the mixture, and return the trained model and the run's figures."""
    (encoded, too_long), (dev, dev_too_long) = (encode_rows(rows, tokenizer, settings.max_length) for rows in mixture)
    if not encoded or not dev:
        raise ValueError(
            f"max_length={settings.max_length} tokens is too short for every training or dev row: raise it."
        )
    left_out = {"train_rows_left_out": too_long, "dev_rows_left_out": dev_too_long}
    if is_main_process():
        print(f"left out, longer than max_length={settings.max_length} tokens: {left_out}")

    def dev_metrics(model) -> dict[str, float]:
        return {"dev_loss": fmean(answer_loss(model, dev, batch_size, "dev"))}

    collator = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED_LABEL)
    model, figures = train(settings, model, encoded, collator, dev_metrics, folder)
    return model, left_out | figures


def score(model, tokenizer, tests: dict[str, Rows], evaluation: Evaluation, folder: str) -> tuple[list[dict], dict]:
    """Return set, loss and, if generated, text and correctness of every row; and what math-verify could not decide."""
    scored = []
    for name, rows in tests.items():
        encoded, _ = encode_rows(rows, tokenizer)
        losses = answer_loss(model, encoded, evaluation.eval_batch_size, f"{name} loss")
        scored += [{"set": name, "loss": loss} for loss in losses]
    if not evaluation.generate:
        return scored, {}
    problems = list(chain.from_iterable(tests.values()))
    # Texts of an interrupted run count if they are of exactly this model: one with these losses.
    same = short_hash([row["loss"] for row in scored])
    texts = generate(
        model,
        tokenizer,
        [prompt(row) for row in problems],
        evaluation.max_new_tokens,
        evaluation.eval_batch_size,
        stop=STOP,
        folder=os.path.join(folder, f"texts-{same}"),
    )
    verifier = MathVerify()
    pairs = tqdm(list(zip(scored, problems, texts, strict=True)), desc="judging", disable=not is_main_process())
    for row, problem, text in pairs:
        row |= {"text": text} | judge(row["set"], problem["solution"], text, verifier)
    return scored, {"math_verify": {"timeouts": verifier.timeouts, "errors": dict(verifier.errors)}}


def summary(scored: Sequence[dict]) -> dict[str, float]:
    """Return means over all rows, and over those of each set."""
    names = [name for name in ("loss", "strict", "flexible") if name in scored[0]]
    sets = {row["set"]: [r for r in scored if r["set"] == row["set"]] for row in scored}
    figures = {name: fmean(row[name] for row in scored) for name in names}
    return figures | {f"{s}_{name}": fmean(row[name] for row in rows) for s, rows in sets.items() for name in names}


def run(
    evaluation: Evaluation, settings: Training, data_dir: str | None, output: str, keep_adapter: bool = False
) -> dict:
    """Train, unless the method is none, and score; return the run, whose JSON goes to `output`."""
    saved = settings_of(settings, **evaluation.saved)
    mixture = load_mixture(evaluation.train, data_dir, evaluation.train_rows, evaluation.dev_rows)
    tests = {name: load_test(name, data_dir, evaluation.test_rows) for name in TESTS}
    parts = {"train": mixture[0], "dev": mixture[1]} | {f"{name}_test": rows for name, rows in tests.items()}
    data = {name: rows.record for name, rows in parts.items()}

    def make(result: dict):
        return _train_and_score(evaluation, settings, mixture, tests, checkpoints(output), result)

    return run_once(output, "math_problems", saved, data, make, keep_adapter)


def _train_and_score(evaluation: Evaluation, settings: Training, mixture, tests, folder: str, result: dict):
    result |= {"metric": "strict" if evaluation.generate else "loss", "dev_metric": "dev_loss"}
    tokenizer, model = load_causal_lm(settings)
    check_length(model, longest(tests, tokenizer, evaluation))  # before hours of training
    model, figures = fit(model, tokenizer, settings, mixture, evaluation.eval_batch_size, folder)
    result |= figures
    result["rows"], figures = score(model, tokenizer, tests, evaluation, folder)
    result |= figures
    result["metrics"] = summary(result["rows"])
    result["predictions"] = [row[result["metric"]] for row in result["rows"]]
    return model


def main() -> None:
    run_command(__doc__, Evaluation, run, max_length=512)


if __name__ == "__main__":
    main()
