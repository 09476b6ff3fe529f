"""Rows out of files, folders, saved datasets and the hub, and the innermost cause where they cannot be read."""

from __future__ import annotations

import glob
import gzip
import hashlib
import json
import os
import re
from typing import BinaryIO

from ..version import install_command

_FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
_SPLITS = {"train": ("train",), "validation": ("validation", "valid", "dev", "eval"), "test": ("test",)}


def load_rows(source: str, split: str = "train"):
    """Return the rows of a source as a `datasets.Dataset`.

    Args:
        source: a JSONL, JSON, CSV, TSV or Parquet file (also .gz), a folder of such files, a pattern for their names, a
            dataset that was saved with `save_to_disk`, or a dataset on the hub: "name" or "name:config".
        split: "train", "validation" or "test": which part is read where a source has several.

    Raises:
        ImportError: names the extra. FileNotFoundError, ValueError: name the source and the innermost cause.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"Reading data needs datasets: {install_command('finetune')}.") from error
    if os.path.isdir(source) and _is_saved(source):
        return _load_saved(source, split)
    files = find_files(source, split)
    if files:
        return _load_files(source, files)
    if _extension(source) in _FORMATS or source.startswith((".", "/", "~")):
        raise FileNotFoundError(f"data={source!r} does not exist.")
    name, _, config = source.partition(":")
    try:
        return datasets.load_dataset(name, config or None, split=split)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"data={source!r} is no file or folder here, nor a dataset of the hub: {reason}") from error


def find_files(source: str, split: str = "train") -> list[str]:
    """Return the data files that a file, folder or pattern stands for, sorted; empty for what is none of them.

    Where files of a folder are named after splits, as in train.jsonl and test.jsonl, those of one split are meant.

    Raises:
        FileNotFoundError: the folder or pattern has no data files. ValueError: a file has an unknown format.
    """
    if os.path.isfile(source):
        return [source]
    if os.path.isdir(source):
        found = [os.path.join(source, name) for name in sorted(os.listdir(source)) if _extension(name) in _FORMATS]
        if not found:
            raise FileNotFoundError(
                f"data={source!r} is a folder without data files ({', '.join(_FORMATS)}): name one."
            )
    elif glob.has_magic(source):
        found = [path for path in sorted(glob.glob(source, recursive=True)) if os.path.isfile(path)]
        if not found:
            raise FileNotFoundError(f"data={source!r} matches no file.")
    else:
        return []
    named = {path: _split_of(path) for path in found}
    return [path for path in found if named[path] == split] if any(named.values()) else found


def content_hash(rows) -> str:
    """Return a hash of all values of a dataset, in their order, whatever files they come from."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()


def _split_of(path: str) -> str | None:
    words = re.split(r"[^a-z]+", os.path.basename(path).lower())
    return next((split for split, names in _SPLITS.items() if not set(names).isdisjoint(words)), None)


def _extension(path: str) -> str:
    return os.path.splitext(path.lower().removesuffix(".gz"))[1]


def _is_saved(folder: str) -> bool:
    return any(os.path.exists(os.path.join(folder, name)) for name in ("dataset_dict.json", "state.json"))


def _load_saved(folder: str, split: str):
    import datasets

    try:
        saved = datasets.load_from_disk(folder)
    except Exception as error:
        raise ValueError(f"data={folder!r} could not be read as a saved dataset: {_innermost(error)}") from error
    if not isinstance(saved, datasets.DatasetDict):
        return saved
    if split not in saved:
        raise ValueError(
            f"data={folder!r} is a saved dataset with the parts {', '.join(saved)}, none of which is {split!r}."
        )
    return saved[split]


def _load_files(source: str, files: list[str]):
    import datasets

    extensions = {_extension(path) for path in files}
    if not extensions <= set(_FORMATS):
        raise ValueError(f"data={source!r} has an unknown format: use one of {', '.join(_FORMATS)}, or those with .gz.")
    if len(extensions) > 1:
        raise ValueError(f"data={source!r} has files of several formats ({', '.join(sorted(extensions))}): name some.")
    for path in files:
        if os.path.getsize(path) == 0:
            raise ValueError(f"data={path!r} is empty.")
    extension = extensions.pop()
    options = {"sep": "\t"} if extension == ".tsv" else {}
    try:
        return datasets.load_dataset(_FORMATS[extension], data_files=files, split="train", **options)
    except Exception as error:
        reason = _broken_line(files, extension) or _innermost(error)
        raise ValueError(f"data={source!r} could not be read as {extension[1:]}: {reason}") from error


def _innermost(error: BaseException) -> str:
    """Return what the first of a chain of errors says, in one line."""
    while error.__cause__ is not None or error.__context__ is not None:
        error = error.__cause__ or error.__context__
    return " ".join(str(error).split()) or type(error).__name__


def _broken_line(files: list[str], extension: str) -> str | None:
    """Return which line of which file is broken and where in it, or None if each can be read."""
    for path in files:
        try:
            with (gzip.open if path.lower().endswith(".gz") else open)(path, "rb") as file:
                reason = _broken_part(file, extension)
        except OSError as error:
            return f"{path}: {error}"
        if reason:
            return f"{path}{reason}"
    return None


def _broken_part(file: BinaryIO, extension: str) -> str | None:
    """Read a file line by line, as it may be larger than memory; only JSON that is no JSONL is read whole."""
    is_empty = True
    for number, line in enumerate(file, start=1):
        is_empty = is_empty and not line.strip()
        try:
            text = line.decode().rstrip("\n")
        except UnicodeDecodeError as error:
            return f", line {number}, byte {error.start + 1}: it is not UTF-8 ({error.reason})."
        if extension == ".jsonl" and text.strip():
            reason = _broken_json(text)
            if reason:
                return f", line {number}, {reason}"
            if not isinstance(json.loads(text), dict):
                return f', line {number} has no fields: write an object such as {{"text": ...}}.'
    if is_empty:
        return " is empty."
    if extension == ".json":
        file.seek(0)
        reason = _broken_json(file.read().decode())
        return reason and f", {reason}"
    return None


def _broken_json(text: str) -> str | None:
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in text else ""
        before = text.split("\n")[error.lineno - 1][: error.colno - 1]
        return f"{line}byte {len(before.encode()) + 1}: {error.msg}."
    return None
