"""GSM8K, MATH and MetaMathQA: their rows, the prompt, and which generated solutions are right."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

from eval.harness.answers import MathVerify, boxed_answer, gsm8k_answer, last_number, same_number
from eval.harness.rows import DataError, Field, Rows, Source, load, split_dev
from peft_scalora.finetuning.prompts import encode_all

# MetaMath (arXiv:2309.12284), train_math.py; the solution follows at once.
PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{question}\n\n### Response: Let's think step by step."
)
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


def load_problems(name: str, split: str, data_dir: str | None) -> Rows:
    """Return all rows of a split, with the fields `question` and `solution`.

    `name` may be a file of MetaMathQA's fields.

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


def load_mixture(
    names: Sequence[str], data_dir: str | None, train_rows: int | None, dev_rows: int
) -> tuple[Rows, Rows]:
    """Return training rows, mixed, and dev rows, the same ones in every run."""
    parts = [load_problems(name, "train", data_dir) for name in names]
    together = Rows(tuple(chain.from_iterable(parts)), " + ".join(part.source for part in parts))
    return split_dev(together, dev_rows, train_rows)


def load_test(name: str, data_dir: str | None, count: int | None) -> Rows:
    """Return `count` test rows, or all for None: drawn with a fixed seed, since files may be sorted.

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
    """Return what a row's solution follows."""
    return PROMPT.format(question=row["question"])


def encode_rows(rows: Sequence[dict], tokenizer, max_length: int | None = None) -> tuple[list[dict], int]:
    """Return the rows that fit into `max_length`, with labels on the solution, and the number of those that do not."""
    return encode_all([(prompt(row), row["solution"]) for row in rows], tokenizer, max_length)


def judge(name: str, solution: str, text: str, verifier: MathVerify) -> dict[str, int]:
    """Return 1 where the final answer of a generated text is that of the given solution, read strictly and flexibly."""
    if name == "gsm8k":
        reference = gsm8k_answer(solution)
        strict = same_number(reference, gsm8k_answer(text))
        return {"strict": int(strict), "flexible": int(same_number(reference, last_number(text)))}
    reference, boxed = boxed_answer(solution), boxed_answer(text)
    strict = verifier.same_answer(reference, boxed)
    flexible = strict if boxed is not None else verifier.agrees(reference, text)
    return {"strict": int(strict), "flexible": int(flexible)}
