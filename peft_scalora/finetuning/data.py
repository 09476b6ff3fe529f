"""Rows for fine-tuning, from a file or the hub, to token ids and labels. Needs the extra `finetune`."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace

from ..version import install_command

IGNORED_LABEL = -100
_FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass(frozen=True)
class Fields:
    """Which fields of a row hold what; empty names are guessed from the common ones.

    `input` is what an instruction is about (Alpaca's format), may be empty in a row, and follows the prompt.
    """

    text: tuple[str, ...] = ()
    label: str = ""
    prompt: str = ""
    completion: str = ""
    input: str = ""

    def required(self) -> list[str]:
        return [name for name in (*self.text, self.label, self.prompt, self.completion) if name]


_PAIRS = (("sentence1", "sentence2"), ("question1", "question2"), ("premise", "hypothesis"), ("question", "sentence"))
_SINGLES = (("sentence",), ("text",))
_PROMPTS = (("prompt", "completion"), ("question", "answer"), ("problem", "solution"), ("instruction", "output"))


def load_rows(source: str, split: str = "train"):
    """A `datasets.Dataset` from a JSONL, JSON, CSV or Parquet file (also .gz), or a hub id "name" or "name:config".

    Raises:
        ImportError: names the extra. FileNotFoundError, ValueError: name the source.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"Reading data needs datasets: {install_command('finetune')}.") from error
    stem = source.removesuffix(".gz")
    extension = os.path.splitext(stem)[1]
    if os.path.exists(source):
        if extension not in _FORMATS:
            raise ValueError(
                f"data={source!r} has an unknown format: use one of {', '.join(_FORMATS)}, or those with .gz."
            )
        try:
            return datasets.load_dataset(_FORMATS[extension], data_files=source, split="train")
        except Exception as error:
            raise ValueError(f"data={source!r} could not be read as {_FORMATS[extension]}: {error}") from error
    if extension in _FORMATS:
        raise FileNotFoundError(f"data={source!r} does not exist.")
    name, _, config = source.partition(":")
    return datasets.load_dataset(name, config or None, split=split)


def find_fields(columns: list[str], task: str, fields: Fields) -> Fields:
    """Fill in the field names that were not given, or say which were looked for."""
    if task == "classification":
        text = fields.text or next((f for f in (*_PAIRS, *_SINGLES) if set(f) <= set(columns)), ())
        label = fields.label or ("label" if "label" in columns else "")
        found = Fields(text=text, label=label)
    else:
        pair = (fields.prompt, fields.completion)
        if not any(pair) and not fields.text:
            pair = next((f for f in _PROMPTS if set(f) <= set(columns)), ("", ""))
        found = Fields(prompt=pair[0], completion=pair[1])
        if not any(pair):
            found = Fields(text=fields.text or (("text",) if "text" in columns else ()))
        if found.prompt == "instruction" and "input" in columns:
            found = replace(found, input="input")
    whole = found.text and found.label if task == "classification" else found.text or all(pair)
    if not whole or not set(found.required()) <= set(columns):
        raise ValueError(
            f"the data's fields {sorted(columns)} do not fit task={task!r}: found text={found.text!r}, "
            f"label={found.label!r}, prompt={found.prompt!r}, completion={found.completion!r}. Name them with "
            "--text-fields, --label-field, or --prompt-field and --completion-field."
        )
    return found


def check_rows(rows, fields: Fields, source: str) -> None:
    """Refuse data without rows, and rows without a text or label or with one that is no string, number or boolean.

    Raises:
        ValueError: names source, row (counted from 1), field and value.
    """
    if len(rows) == 0:
        raise ValueError(f"data={source!r} has no rows.")
    for name in fields.required():
        if name not in rows.column_names:
            raise ValueError(f"data={source!r} has no field {name!r}: its fields are {sorted(rows.column_names)}.")
        for number, value in enumerate(rows[name][:], start=1):
            if not isinstance(value, (str, int, float)) or (isinstance(value, float) and not math.isfinite(value)):
                raise ValueError(
                    f"data={source!r}, row {number}: field {name!r} has {value!r}, not a string, finite number or "
                    "boolean. Remove the row, or name another field."
                )


def find_classes(rows, label: str, source: str) -> list | None:
    """The distinct labels, sorted: classes are numbered in this order. None where labels are floats: regression."""
    classes = sorted(set(rows[label][:]))
    if isinstance(classes[0], float):
        return None
    if len(classes) == 1:
        raise ValueError(
            f"data={source!r}: every row has {classes[0]!r} in field {label!r}, there is nothing to tell apart."
        )
    return classes


def check_labels(rows, label: str, classes: list | None, source: str) -> None:
    """Refuse rows to evaluate on whose labels are none of the training rows' classes, or no numbers in regression."""
    for number, value in enumerate(rows[label][:], start=1):
        if isinstance(value, str) if classes is None else value not in classes:
            known = "numbers" if classes is None else ", ".join(map(repr, classes))
            raise ValueError(
                f"data={source!r}, row {number}: field {label!r} has {value!r}, the training rows have {known}. Remove "
                "the row, or train on rows with that label."
            )


def hold_out(rows, count: int, source: str) -> tuple:
    """Training rows, and up to `count` rows, at most a fifth, to evaluate on; always the same ones.

    Raises:
        ValueError: there are fewer than 5 rows.
    """
    if len(rows) < 5:
        raise ValueError(
            f"data={source!r} has {len(rows)} rows, too few to hold some out for evaluation: give at least 5, or "
            "eval_data."
        )
    parts = rows.train_test_split(test_size=min(count, len(rows) // 5), seed=0)
    return parts["train"], parts["test"]


def encode(rows, tokenizer, task: str, fields: Fields, max_length: int, classes: list | None = None):
    """Map rows to `input_ids`, `attention_mask` and labels; prompts of prompt-completion rows are not trained on.

    Labels are the places of the rows' labels in `classes`; None keeps them, as numbers.
    """
    number_of = {value: number for number, value in enumerate(classes or ())}

    def classification(row: dict) -> dict:
        texts = (str(row[name]) for name in fields.text)
        label = float(row[fields.label]) if classes is None else number_of[row[fields.label]]
        return {**tokenizer(*texts, truncation=True, max_length=max_length), "labels": label}

    def causal(row: dict) -> dict:
        if fields.completion:
            about = f"{row[fields.input]}\n" if row.get(fields.input) else ""
            prompt = tokenizer(f"{row[fields.prompt]}\n{about}")["input_ids"]
            answer = tokenizer(str(row[fields.completion]), add_special_tokens=False)["input_ids"]
        else:
            prompt, answer = [], tokenizer(str(row[fields.text[0]]))["input_ids"]
        ids = (prompt + answer + [tokenizer.eos_token_id])[:max_length]
        labels = ([IGNORED_LABEL] * len(prompt) + answer + [tokenizer.eos_token_id])[:max_length]
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}

    encoded = rows.map(
        classification if task == "classification" else causal, remove_columns=rows.column_names, desc="encoding"
    )
    if task == "causal-lm":  # a row cut within its prompt would have the loss of no token at all, which is nan
        encoded = encoded.filter(lambda labels: any(i != IGNORED_LABEL for i in labels[1:]), input_columns="labels")
    if len(encoded) == 0:
        raise ValueError(f"no row of the data fits into max_length={max_length}: raise it.")
    return encoded
