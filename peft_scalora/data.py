"""Rows for fine-tuning, from a file or the hub, to token ids and labels. Needs the extra `finetune`."""

from __future__ import annotations

import os
from dataclasses import dataclass

IGNORED_LABEL = -100
_FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass(frozen=True)
class Fields:
    """Which fields of a row hold what; empty names are guessed from the common ones."""

    text: tuple[str, ...] = ()
    label: str = ""
    prompt: str = ""
    completion: str = ""


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
        raise ImportError("Reading data needs datasets: pip install 'peft-scalora[finetune]'.") from error
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
        wanted = [*text, label]
    else:
        pair = (fields.prompt, fields.completion)
        if not any(pair) and not fields.text:
            pair = next((f for f in _PROMPTS if set(f) <= set(columns)), ("", ""))
        found = Fields(prompt=pair[0], completion=pair[1])
        if not any(pair):
            found = Fields(text=fields.text or (("text",) if "text" in columns else ()))
        wanted = [*found.text, *(name for name in pair if name)]
    missing = [name for name in wanted if name not in columns]
    if missing or not wanted or (task == "classification" and not (found.text and found.label)):
        raise ValueError(
            f"the data's fields {sorted(columns)} do not fit task={task!r}: found text={found.text!r}, "
            f"label={found.label!r}, prompt={found.prompt!r}, completion={found.completion!r}. Name them with "
            "--text-fields, --label-field, or --prompt-field and --completion-field."
        )
    return found


def encode(rows, tokenizer, task: str, fields: Fields, max_length: int):
    """Map rows to `input_ids`, `attention_mask` and labels; prompts of prompt-completion rows are not trained on."""

    def classification(row: dict) -> dict:
        if row[fields.label] is None:
            raise ValueError(f"a row has no {fields.label!r}: {row!r}. Remove it, or name another --label-field.")
        encoded = tokenizer(*(row[name] for name in fields.text), truncation=True, max_length=max_length)
        return {**encoded, "labels": row[fields.label]}

    def causal(row: dict) -> dict:
        if fields.completion:
            prompt = tokenizer(f"{row[fields.prompt]}\n")["input_ids"]
            answer = tokenizer(row[fields.completion], add_special_tokens=False)["input_ids"]
        else:
            prompt, answer = [], tokenizer(row[fields.text[0]])["input_ids"]
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
