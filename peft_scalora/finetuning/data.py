"""Rows for fine-tuning: which fields hold what, checks, and token ids. Needs the extra `finetune`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

from .chat import check_messages, messages_of, tokenize_chat
from .prompts import IGNORED_LABEL
from .settings import CAUSAL_LM
from .sources import load_rows

__all__ = ["IGNORED_LABEL", "Fields", "encode", "find_fields", "load_rows"]


@dataclass(frozen=True)
class Fields:
    """Names of a row's fields by what they hold; empty names are guessed from the common ones.

    `input` is what an instruction is about (Alpaca's format). It follows the prompt and may be empty in a row.
    `messages` are a conversation; its assistant's turns are trained on. Where prompt and completion are lists of
    messages, the turns of the completion are.
    """

    text: tuple[str, ...] = ()
    label: str = ""
    prompt: str = ""
    completion: str = ""
    input: str = ""
    messages: str = ""

    def required(self) -> list[str]:
        named = (*self.text, self.label, self.prompt, self.completion, self.messages)
        return [name for name in named if name]


@dataclass
class Lengths:
    """Counts of rows: all, those left out and those cut at the longest length allowed."""

    rows: int
    left_out: int = 0
    cut: int = 0


_PAIRS = (("sentence1", "sentence2"), ("question1", "question2"), ("premise", "hypothesis"), ("question", "sentence"))
_SINGLES = (("sentence",), ("text",))
_PROMPTS = (("prompt", "completion"), ("question", "answer"), ("problem", "solution"), ("instruction", "output"))
_CHATS = ("messages", "conversations")


def find_fields(columns: list[str], task: str, fields: Fields) -> Fields:
    """Fill in the field names that were not given, or say which were looked for."""
    found = _language_fields(columns, fields) if task == CAUSAL_LM else _label_fields(columns, fields)
    if task == CAUSAL_LM:
        whole = found.text or found.messages or (found.prompt and found.completion)
    else:
        whole = found.text and found.label
    if not whole or not set(found.required()) <= set(columns):
        guessed = ", ".join(f"{name}={value!r}" for name, value in asdict(found).items() if value) or "none"
        raise ValueError(
            f"the data's fields {sorted(columns)} do not fit task={task!r}: found {guessed}. Name them with "
            "--text-fields, --label-field, --messages-field, or --prompt-field and --completion-field."
        )
    return found


def _label_fields(columns: list[str], fields: Fields) -> Fields:
    text = fields.text or next((f for f in (*_PAIRS, *_SINGLES) if set(f) <= set(columns)), ())
    return Fields(text=text, label=fields.label or ("label" if "label" in columns else ""))


def _language_fields(columns: list[str], fields: Fields) -> Fields:
    if fields.prompt or fields.completion:
        return _with_input(Fields(prompt=fields.prompt, completion=fields.completion), columns)
    if fields.messages or fields.text:
        return Fields(messages=fields.messages) if fields.messages else Fields(text=fields.text)
    chat = next((name for name in _CHATS if name in columns), "")
    if chat:
        return Fields(messages=chat)
    pair = next((pair for pair in _PROMPTS if set(pair) <= set(columns)), None)
    if pair:
        return _with_input(Fields(prompt=pair[0], completion=pair[1]), columns)
    return Fields(text=("text",) if "text" in columns else ())


def _with_input(fields: Fields, columns: list[str]) -> Fields:
    return replace(fields, input="input") if fields.prompt == "instruction" and "input" in columns else fields


def values_of(rows, field: str) -> Iterator:
    """Yield the values of a field, of few rows at a time: data may be larger than memory."""
    for batch in rows.select_columns([field]).iter(1000):
        yield from batch[field]


def check_rows(rows, fields: Fields, source: str) -> None:
    """Refuse data without rows, and rows with a field that is no string, number or boolean, nor a conversation.

    Raises:
        ValueError: names source, row (counted from 1), field and value.
    """
    if len(rows) == 0:
        raise ValueError(f"data={source!r} has no rows.")
    for name in fields.required():
        if name not in rows.column_names:
            raise ValueError(f"data={source!r} has no field {name!r}: its fields are {sorted(rows.column_names)}.")
        conversations = name == fields.messages or (name == fields.prompt and isinstance(rows[0][name], list))
        for number, value in enumerate(values_of(rows, name), start=1):
            place = f"data={source!r}, row {number}: field {name!r}"
            if conversations or (isinstance(value, list) and name == fields.completion and _are_messages(value)):
                check_messages(value, place, answered=name != fields.prompt)
            elif not isinstance(value, (str, int, float)) or (isinstance(value, float) and not math.isfinite(value)):
                raise ValueError(
                    f"{place} has {value!r}, not a string, finite number or boolean. Remove the row, or name another "
                    "field."
                )


def _are_messages(value: list) -> bool:
    return bool(value) and all(isinstance(message, dict) for message in value)


def find_classes(rows, label: str, source: str) -> list | None:
    """Return the distinct labels, sorted: classes are numbered in this order. None where labels are fractions.

    Whole numbers are classes in either form, 1 or 1.0: a column with a gap, or a table program, writes the latter.

    Raises:
        ValueError: the labels are of several kinds, or all the same.
    """
    labels = rows[label][:]
    kinds: dict[str, int] = {}
    for number, value in enumerate(labels, start=1):
        kinds.setdefault(_kind(value), number)
    if len(kinds) > 1:
        named = ", ".join(f"{labels[number - 1]!r} in row {number}" for number in kinds.values())
        raise ValueError(
            f"data={source!r}: field {label!r} mixes {' and '.join(kinds)} ({named}). Write all labels as one kind."
        )
    if "numbers" in kinds:
        if not all(float(value).is_integer() for value in labels):
            return None
        labels = [int(value) for value in labels]
    classes = sorted(set(labels))
    if len(classes) == 1:
        raise ValueError(
            f"data={source!r}: every row has {classes[0]!r} in field {label!r}, there is nothing to tell apart."
        )
    return classes


def _kind(label) -> str:
    if isinstance(label, bool):
        return "true or false"
    return "strings" if isinstance(label, str) else "numbers"


def check_labels(rows, label: str, classes: list | None, source: str) -> None:
    """Refuse rows whose labels are none of the training rows' classes, or no numbers where classes is None."""
    for number, value in enumerate(values_of(rows, label), start=1):
        if isinstance(value, str) if classes is None else value not in classes:
            known = "numbers" if classes is None else ", ".join(map(repr, classes))
            raise ValueError(
                f"data={source!r}, row {number}: field {label!r} has {value!r}, the training rows have {known}. Remove "
                "the row, or train on rows with that label."
            )


def hold_out(rows, count: int, source: str) -> tuple:
    """Return training rows, and up to `count` rows, at most a fifth, to evaluate on; always the same ones.

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
    """Map rows to `input_ids`, `attention_mask` and labels; prompts and a chat's other turns are not trained on.

    Labels are the places of the rows' labels in `classes`; None keeps them, as numbers.
    """
    return encode_counting(rows, tokenizer, task, fields, max_length, classes)[0]


def encode_counting(
    rows, tokenizer, task: str, fields: Fields, max_length: int, classes: list | None = None
) -> tuple[object, Lengths]:
    """Return the encoded rows, and how many of them are whole, cut or left out.

    Raises:
        ValueError: no row is left.
    """
    number_of = {value: number for number, value in enumerate(classes or ())}

    def labelled(row: dict) -> dict:
        encoded = dict(tokenizer(*(str(row[name]) for name in fields.text)))
        length = len(encoded["input_ids"])
        if length > max_length:
            encoded = dict(tokenizer(*(str(row[name]) for name in fields.text), truncation=True, max_length=max_length))
        label = float(row[fields.label]) if classes is None else number_of[row[fields.label]]
        return {**encoded, "labels": label, "length": length}

    def language(row: dict) -> dict:
        ids, trained = tokenize(row, tokenizer, fields)
        labels = [token if is_trained else IGNORED_LABEL for token, is_trained in zip(ids, trained)]
        kept = ids[:max_length]
        return {"input_ids": kept, "attention_mask": [1] * len(kept), "labels": labels[:max_length], "length": len(ids)}

    function = language if task == CAUSAL_LM else labelled
    encoded = rows.map(function, remove_columns=rows.column_names, desc="encoding")
    lengths = Lengths(rows=len(rows))
    if task == CAUSAL_LM:  # a row cut within its prompt would have the loss of no token at all, which is nan
        encoded = encoded.filter(lambda labels: any(i != IGNORED_LABEL for i in labels[1:]), input_columns="labels")
        lengths.left_out = lengths.rows - len(encoded)
        lengths.rows = len(encoded)
    if len(encoded) == 0:
        raise ValueError(f"no row of the data fits into max_length={max_length}: raise it.")
    lengths.cut = sum(length > max_length for length in values_of(encoded, "length"))
    return encoded.remove_columns("length"), lengths


def tokenize(row: dict, tokenizer, fields: Fields) -> tuple[list[int], list[bool]]:
    """Return the token ids of a row for language modelling, and for each whether it is trained on."""
    messages = messages_of(row, fields.messages, fields.prompt, fields.completion)
    if messages:
        first = len(row[fields.prompt]) if fields.completion else 0
        return tokenize_chat(messages, tokenizer, first)
    if fields.completion:
        prompt = tokenizer(prompt_text(row, fields))["input_ids"]
        answer = tokenizer(str(row[fields.completion]), add_special_tokens=False)["input_ids"]
    else:
        prompt = []
        answer = tokenizer(str(row[fields.text[0]]))["input_ids"]
    answer = [*answer, tokenizer.eos_token_id]
    return prompt + answer, [False] * len(prompt) + [True] * len(answer)


def prompt_text(row: dict, fields: Fields) -> str:
    """Return a prompt as it is trained with: a line, and another for the input where there is one."""
    about = f"{row[fields.input]}\n" if row.get(fields.input) else ""
    return f"{row[fields.prompt]}\n{about}"
