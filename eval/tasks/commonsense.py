"""The eight commonsense tasks: their rows, prompts and training mixture.

Rows have the shape of LLM-Adapters (arXiv:2304.01933): instruction, input, output, answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from eval.harness.likelihood import encode_pair
from eval.harness.rows import DataError, Field, Rows, Source, load, split_dev
from peft_scalora.finetuning.prompts import Encoded, with_labels

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


def prompt(row: dict) -> str:
    """Return what a row's answer follows."""
    return TEMPLATE.format(instruction=row["instruction"])


def choices(row: dict) -> list[str]:
    """Return the answers that the instruction allows; none if it does not say."""
    found = re.search(r"Answer format:\s*(\S+)\s*$", row["instruction"])
    return found[1].split("/") if found else []


def load_rows(task: str, split: str, data_dir: str | None) -> Rows:
    """Return all rows of a task's split, "train" or "test", or of the whole training mixture, which only the hub has.

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
    """Return which field is wrong, and why; None of a row as it has to be."""
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
    """Return training rows and dev rows, by part: one a task from a folder, and one for all from the hub.

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


def encode(rows: Sequence[dict], tokenizer, max_length: int) -> list[Encoded]:
    """Return prompt, output and EOS of every row, labels on the latter two; rows over `max_length` are left out."""
    pairs = (encode_pair(tokenizer, prompt(row), row["output"]) for row in rows)
    encoded = [with_labels(*pair, tokenizer.eos_token_id, max_length) for pair in pairs]
    encoded = [row for row in encoded if row is not None]
    if not encoded:
        raise ValueError(f"no training row fits into max_length={max_length} tokens: raise it.")
    return encoded


def longest(parts: Iterable[Rows], tokenizer) -> int:
    """Return the tokens of the longest prompt with a choice, less the last one."""
    pairs = (
        encode_pair(tokenizer, prompt(row), OUTPUT + choice)
        for rows in parts
        for row in rows
        for choice in choices(row)
    )
    return max(len(context) + len(continuation) for context, continuation in pairs) - 1
