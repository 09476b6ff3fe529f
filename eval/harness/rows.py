"""Rows of an evaluation, from local JSONL or the hub, checked before anything is trained or scored on them."""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import os
import random
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass


class DataError(ValueError):
    """Data that cannot be used; the message names the file, the row (from 1) and the field."""


@dataclass(frozen=True)
class Field:
    """What a field of every row has to be.

    Attributes:
        kind: str (never empty, unless `may_be_empty`), int, or float (an int will do).
        choices: the only values allowed, if any.
    """

    kind: type
    choices: tuple = ()
    may_be_empty: bool = False

    def complaint(self, value) -> str | None:
        if value is None:
            return "is missing"
        allowed = (int, float) if self.kind is float else self.kind
        if not isinstance(value, allowed) or isinstance(value, bool):
            return f"is {value!r}, not of type {self.kind.__name__}"
        if self.kind is str and not self.may_be_empty and not value.strip():
            return "is empty"
        if self.kind is float and not math.isfinite(value):
            return f"is {value!r}, not a finite number"
        if self.choices and value not in self.choices:
            return f"is {value!r}, not one of {', '.join(map(str, self.choices))}"
        return None


@dataclass(frozen=True)
class Source:
    """Where rows are: a path below a data folder, and the same on the hub (a data set's id) or at a JSON file's URL."""

    local: str
    hub: str
    config: str | None = None
    split: str = "train"


@dataclass(frozen=True)
class Rows(Sequence):
    """Rows with what a sceptic needs to see that they are the same ones."""

    rows: tuple[dict, ...]
    source: str

    def __getitem__(self, index):
        return self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)

    def part(self, start: int, stop: int | None = None) -> Rows:
        """Return rows start to stop; `record` tells the number."""
        return Rows(self.rows[start:stop], self.source)

    @property
    def record(self) -> dict:
        """Return source, number and hash of the rows, in this order, however they were compressed."""
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False).encode() + b"\n")
        return {"source": self.source, "rows": len(self.rows), "sha256": digest.hexdigest()}


def load(source: Source, data_dir: str | None, fields: Mapping[str, Field]) -> Rows:
    """Return all rows of `source`, from `data_dir` if given, else from the hub; every row has every field.

    Raises:
        DataError: names file, row and field.
    """
    if data_dir is None:
        name, rows = ":".join(filter(None, (source.hub, source.config, source.split))), _from_hub(source)
    else:
        path = os.path.join(data_dir, source.local)
        name, rows = source.local, _from_jsonl(path)
    checked = tuple(_checked(rows, name if data_dir is None else path, fields))
    if not checked:
        raise DataError(f"{name} has no row.")
    return Rows(checked, name)


def _from_hub(source: Source) -> Iterator[dict]:
    import datasets

    if source.hub.startswith("https://"):
        return iter(datasets.load_dataset("json", data_files={source.split: source.hub}, split=source.split))
    return iter(datasets.load_dataset(source.hub, source.config, split=source.split))


def _from_jsonl(path: str) -> Iterator[dict]:
    if not os.path.exists(path):
        raise DataError(f"{path} does not exist: --data-dir is a folder of the layout that docs/evaluation.md shows.")
    opener = gzip.open if path.endswith(".gz") else open
    number = 1
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            for line in file:
                yield json.loads(line)
                number += 1
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, row {number}: not JSON ({error}).") from error
    except (EOFError, zlib.error, gzip.BadGzipFile, UnicodeDecodeError) as error:
        raise DataError(f"{path}, row {number}: the file is damaged or cut short ({error}).") from error


def _checked(rows: Iterator[dict], source: str, fields: Mapping[str, Field]) -> Iterator[dict]:
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise DataError(f"{source}, row {number}: not an object with named fields but {type(row).__name__}.")
        for name, field in fields.items():
            complaint = field.complaint(row.get(name))
            if complaint:
                found = ", ".join(map(str, row))
                raise DataError(f"{source}, row {number}: field {name!r} {complaint} (the row's fields: {found}).")
        yield row


def split_dev(rows: Rows, dev_rows: int, train_rows: int | None = None) -> tuple[Rows, Rows]:
    """Return training rows, and `dev_rows` rows taken out of them to choose by, the same ones for every run.

    `train_rows` of the rest are kept, all of them unless given.

    Raises:
        ValueError: no dev row, or more of them than half of the rows; no training row, or more than there are.
    """
    if not 0 < dev_rows <= len(rows) // 2:
        raise ValueError(f"dev_rows={dev_rows} must be from 1 to half of the {len(rows)} rows of {rows.source}.")
    shuffled = random.Random(0).sample(rows.rows, len(rows))
    cut = len(rows) - dev_rows
    if train_rows is not None and not 0 < train_rows <= cut:
        raise ValueError(f"train_rows={train_rows} must be from 1 to {cut}, the other rows of {rows.source}.")
    return Rows(tuple(shuffled[:cut][:train_rows]), rows.source), Rows(tuple(shuffled[cut:]), rows.source)
