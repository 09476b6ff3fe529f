r"""Word problems: train a language model on GSM8K, MATH or MetaMathQA, test it on GSM8K and MATH; one run, one JSON.

    python -m eval.math_problems --model M --data-dir D --train gsm8k math --method scalora --output runs/M.json
    python -m eval.math_problems --data-dir D --check-answers

Rows come from the hub, or with --data-dir from `gsm8k/{train,test}.jsonl.gz`, `math/{train,test}.jsonl.gz` and
`metamathqa/train.jsonl.gz` below a folder; --train also takes JSONL files with MetaMathQA's fields, query and response.
`--method none` scores the model as it is. The curve is the loss of `dev` rows taken out of the training rows. The
metrics are of the test rows, scored once, at the end: the loss of the given solution (mean over rows of the mean over
its tokens) and, unless --no-generate, the share of generated solutions whose final answer is right, read strictly
(`#### NUMBER`, `\boxed{}`) and flexibly (see harness/answers.py). A run that was interrupted continues. `accelerate
launch` spreads training, scoring and generation. --check-answers reads the data's own solutions.
"""

from __future__ import annotations

import argparse
import json
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

from tqdm.auto import tqdm
from transformers import DataCollatorForSeq2Seq

from eval.harness.answers import MathVerify, boxed_answer, gsm8k_answer, last_number, same_number
from eval.harness.generate import generate
from eval.harness.likelihood import check_length
from eval.harness.loss import answer_loss
from eval.harness.models import load_causal_lm
from eval.harness.once import run_once
from eval.harness.prompts import encode_all
from eval.harness.record import checkpoints, is_main_process, short_hash
from eval.harness.rows import DataError, Field, Rows, Source, load, split_dev
from eval.harness.training import Training, add_arguments, check_counts, from_arguments, settings_of, train
from peft_scalora.finetuning.data import IGNORED_LABEL

# MetaMath (arXiv:2309.12284), train_math.py; the solution follows at once.
PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{question}\n\n### Response: Let's think step by step."
)
STOP = ("### Instruction:",)  # a model that was not trained goes on with a problem of its own
TESTS = ("gsm8k", "math")
FILE_ENDS = (".jsonl", ".jsonl.gz")


@dataclass(frozen=True)
class Solution(Field):
    """A solution that has to have a final answer of a given form."""

    find: Callable[[str], str | None] = gsm8k_answer
    form: str = "#### NUMBER"

    def complaint(self, value) -> str | None:
        complaint = super().complaint(value)
        if complaint is None and self.find(value) is None:
            return f"has no answer of the form {self.form}"
        return complaint


@dataclass(frozen=True)
class Problems:
    """A data set: the field of the question, the field of the solution and what it has to be, and where it is."""

    question: str
    solution: str
    kind: Field
    hub: str
    config: str | None = None
    may_be_empty: bool = False  # the question


SETS = {
    "gsm8k": Problems("question", "answer", Solution(str), "openai/gsm8k", "main"),
    "math": Problems(
        "problem", "solution", Solution(str, find=boxed_answer, form=r"\boxed{}"), "DigitalLearningGmbH/MATH-lighteval"
    ),
    "metamathqa": Problems("query", "response", Field(str), "meta-math/MetaMathQA", may_be_empty=True),  # 4 rows
}


@dataclass(frozen=True)
class Evaluation:
    """What is trained on and scored, and how, apart from the training itself; all of it is in the run's JSON."""

    train: tuple[str, ...] = ("gsm8k",)
    train_rows: int | None = None
    dev_rows: int = 400
    test_rows: int | None = None  # of each of TESTS
    generate: bool = True
    max_new_tokens: int = 512
    eval_batch_size: int = 16

    def __post_init__(self):
        for name in self.train:
            if name not in SETS and not name.endswith(FILE_ENDS):
                raise ValueError(f"train={name!r} must be one of {', '.join(SETS)}, or a .jsonl or .jsonl.gz file.")
        check_counts(self, ("dev_rows", "test_rows", "max_new_tokens", "eval_batch_size"))

    @property
    def saved(self) -> dict:
        return vars(self) | {"train": [os.path.basename(name) for name in self.train]}


def load_problems(name: str, split: str, data_dir: str | None) -> Rows:
    """All rows of a split, with the fields `question` and `solution`; `name` may be a file of MetaMathQA's fields.

    Raises:
        DataError: names file, row and field.
    """
    if name in SETS:
        problems, local = SETS[name], f"{name}/{split}.jsonl.gz"
    else:
        problems, (data_dir, local) = SETS["metamathqa"], os.path.split(os.path.abspath(name))
    source = Source(local, problems.hub, problems.config, split)
    rows = load(
        source,
        data_dir,
        {problems.question: Field(str, may_be_empty=problems.may_be_empty), problems.solution: problems.kind},
    )
    both = ({"question": row[problems.question], "solution": row[problems.solution]} for row in rows)
    return Rows(tuple(both), rows.source)


def load_mixture(evaluation: Evaluation, data_dir: str | None) -> tuple[Rows, Rows]:
    """Training rows, mixed, and dev rows, the same ones in every run."""
    parts = [load_problems(name, "train", data_dir) for name in evaluation.train]
    together = Rows(tuple(chain.from_iterable(parts)), " + ".join(part.source for part in parts))
    return split_dev(together, evaluation.dev_rows, evaluation.train_rows)


def load_test(name: str, data_dir: str | None, count: int | None) -> Rows:
    """`count` test rows, drawn with a fixed seed since files may be sorted, the same ones in every run; None is all.

    Raises:
        DataError: names file, row and field; an answer may not be empty here, as it is in two training rows of MATH.
    """
    rows = load_problems(name, "test", data_dir)
    for number, row in enumerate(rows, 1):
        if not SETS[name].kind.find(row["solution"]):
            raise DataError(f"{rows.source}, row {number}: field {SETS[name].solution!r} has an empty answer.")
    count = len(rows) if count is None else min(count, len(rows))
    return Rows(tuple(random.Random(0).sample(rows.rows, count)), rows.source)


def prompt(row: dict) -> str:
    return PROMPT.format(question=row["question"])


def encode_rows(rows: Sequence[dict], tokenizer, max_length: int | None = None) -> tuple[list[dict], int]:
    """Rows that fit into `max_length`, with labels on the solution, and the number of those that do not."""
    return encode_all([(prompt(row), row["solution"]) for row in rows], tokenizer, max_length)


def longest(tests: dict[str, Rows], tokenizer, evaluation: Evaluation) -> int:
    """Tokens of the longest test row, or of the longest prompt with what may be generated, less the last one."""
    encoded = list(chain.from_iterable(encode_rows(rows, tokenizer)[0] for rows in tests.values()))
    lengths = [len(row["input_ids"]) for row in encoded]
    if evaluation.generate:
        lengths += [row["labels"].count(IGNORED_LABEL) + evaluation.max_new_tokens for row in encoded]
    return max(lengths) - 1


def judge(name: str, solution: str, text: str, verifier: MathVerify) -> dict[str, int]:
    """1 where the final answer of a generated text is that of the given solution, read strictly and flexibly."""
    if name == "gsm8k":
        reference = gsm8k_answer(solution)
        strict = same_number(reference, gsm8k_answer(text))
        return {"strict": int(strict), "flexible": int(same_number(reference, last_number(text)))}
    reference, boxed = boxed_answer(solution), boxed_answer(text)
    strict = verifier.same_answer(reference, boxed)
    flexible = strict if boxed is not None else verifier.agrees(reference, text)
    return {"strict": int(strict), "flexible": int(flexible)}


def fit(model, tokenizer, settings: Training, mixture: tuple[Rows, Rows], batch_size: int, folder: str):
    """Train on the mixture; the trained model and the run's figures."""
    (encoded, too_long), (dev, dev_too_long) = (encode_rows(rows, tokenizer, settings.max_length) for rows in mixture)
    if not encoded or not dev:
        raise ValueError(
            f"max_length={settings.max_length} tokens is too short for every training or dev row: raise it."
        )
    left_out = {"train_rows_left_out": too_long, "dev_rows_left_out": dev_too_long}
    if is_main_process():
        print(f"left out, longer than max_length={settings.max_length} tokens: {left_out}")

    def dev_metrics(model) -> dict[str, float]:
        return {"dev_loss": mean(answer_loss(model, dev, batch_size, "dev"))}

    collator = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED_LABEL)
    model, figures = train(settings, model, encoded, collator, dev_metrics, folder)
    return model, left_out | figures


def score(model, tokenizer, tests: dict[str, Rows], evaluation: Evaluation, folder: str) -> tuple[list[dict], dict]:
    """Set, loss and, if generated, text and correctness of every test row; and what math-verify could not decide."""
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


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def summary(scored: Sequence[dict]) -> dict[str, float]:
    """Means over all rows, and over those of each set."""
    names = [name for name in ("loss", "strict", "flexible") if name in scored[0]]
    sets = {row["set"]: [r for r in scored if r["set"] == row["set"]] for row in scored}
    figures = {name: mean([row[name] for row in scored]) for name in names}
    return figures | {f"{s}_{name}": mean([row[name] for row in rows]) for s, rows in sets.items() for name in names}


def run(
    evaluation: Evaluation, settings: Training, data_dir: str | None, output: str, keep_adapter: bool = False
) -> dict:
    """Train, unless the method is none, and score; the run's JSON goes to `output`."""
    saved = settings_of(settings, **evaluation.saved)
    mixture = load_mixture(evaluation, data_dir)
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


def check_answers(data_dir: str | None) -> bool:
    """Read every solution of the data, print how many answers were found and agree, and say whether enough do."""
    verifier = MathVerify()
    enough = True
    for name, least in (("gsm8k", 1.0), ("math", 0.99)):
        for split in ("train", "test"):
            rows = load_problems(name, split, data_dir)
            misses = [
                (number, row["solution"])
                for number, row in enumerate(tqdm(rows, desc=f"{name} {split}", leave=False), 1)
                if not CHECKS[name](row["solution"], verifier)
            ]
            agree = len(rows) - len(misses)
            enough &= agree >= least * len(rows)
            print(f"{rows.source}: {agree} of {len(rows)} ({agree / len(rows):.2%}), wanted {least:.0%}")
            for number, solution in misses:
                boxes = solution.count(r"\boxed") + solution.count(r"\fbox")
                print(f"  row {number}: {boxes} boxes, the last {boxed_answer(solution)!r}")
    print(f"math-verify: {verifier.timeouts} timeouts, errors {dict(verifier.errors)}")
    return enough


def _gsm8k_agrees(solution: str, verifier: MathVerify) -> bool:
    """The official extraction, against what `float` and math-verify read after the last ####."""
    written = solution.rsplit("####", 1)[1].strip()
    answer = gsm8k_answer(solution)
    return float(answer) == float(written.replace(",", "")) and verifier.agrees(answer, written)


def _math_agrees(solution: str, verifier: MathVerify) -> bool:
    """The last box, against what math-verify finds in the whole solution."""
    return verifier.agrees(boxed_answer(solution), solution)


CHECKS = {"gsm8k": _gsm8k_agrees, "math": _math_agrees}


def parse_arguments() -> argparse.Namespace:
    data = argparse.ArgumentParser(add_help=False)
    data.add_argument("--data-dir", help="folder of the layout above; the hub unless given")
    data.add_argument(
        "--check-answers", action="store_true", help="only read the data's own solutions, and say how many"
    )
    arguments, _ = data.parse_known_args()
    if arguments.check_answers:
        return arguments
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[data]
    )
    parser.add_argument("--train", nargs="+", default=["gsm8k"], help=f"of {', '.join(SETS)}, or JSONL files")
    parser.add_argument("--train-rows", type=int, help="use so many; all unless given")
    parser.add_argument("--dev-rows", type=int, default=400, help="taken out of the training rows")
    parser.add_argument("--test-rows", type=int, help="so many of each test set; all unless given")
    parser.add_argument("--no-generate", dest="generate", action="store_false", help="loss only")
    parser.add_argument("--max-new-tokens", type=int, default=512)
    parser.add_argument("--eval-batch-size", type=int, default=16)
    parser.add_argument("--output", required=True, help="the run's JSON")
    add_arguments(parser)
    parser.set_defaults(max_length=512)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.check_answers:
        raise SystemExit(0 if check_answers(arguments.data_dir) else 1)
    names = ("train_rows", "dev_rows", "test_rows", "generate", "max_new_tokens", "eval_batch_size")
    chosen = {name: getattr(arguments, name) for name in names}
    evaluation = Evaluation(train=tuple(arguments.train), **chosen)
    result = run(evaluation, from_arguments(arguments), arguments.data_dir, arguments.output, arguments.save_adapter)
    if is_main_process():
        print(json.dumps(result["metrics"], indent=1))


if __name__ == "__main__":
    main()
