"""Rows come out of files of any format, folders, patterns and saved datasets; errors name the innermost cause."""

import gzip
import json

import datasets
import pytest

from peft_scalora.finetuning.sources import content_hash, find_files, load_rows

ROWS = [{"text": "the cat", "label": 0}, {"text": "a, dog", "label": 1}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
TABLE = "text,label\nthe cat,0\n'a, dog',1\n".replace("'", '"')
TABBED = "text\tlabel\nthe cat\t0\na, dog\t1\n"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", LINES),
        ("ROWS.JSONL", LINES),
        ("rows.json", json.dumps(ROWS)),
        ("rows.csv", TABLE),
        ("rows.tsv", TABBED),
        ("Rows.Tsv", TABBED),
        ("rows.jsonl.gz", LINES),
        ("rows.tsv.GZ", TABBED),
    ],
)
def test_formats_are_known_by_the_ending(tmp_path, name, content):
    compressed = name.lower().endswith(".gz")
    (tmp_path / name).write_bytes(gzip.compress(content.encode()) if compressed else content.encode())
    assert load_rows(str(tmp_path / name)).to_list() == ROWS


def test_parquet(tmp_path):
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "rows.parquet")
    assert load_rows(str(tmp_path / "rows.parquet")).to_list() == ROWS


def test_folders_and_patterns_are_all_their_files(tmp_path):
    for number, row in enumerate(ROWS):
        (tmp_path / f"part-{number}.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "notes.txt").write_text("not data")
    assert load_rows(str(tmp_path)).to_list() == ROWS
    assert load_rows(str(tmp_path / "part-*.jsonl")).to_list() == ROWS
    assert load_rows(str(tmp_path / "*-1.jsonl")).to_list() == ROWS[1:]


def test_files_of_a_folder_that_are_named_after_splits(tmp_path):
    for name in ("train-0", "train-1", "dev", "test"):
        (tmp_path / f"{name}.jsonl").write_text("{}\n")
    for split, names in (("train", ["train-0", "train-1"]), ("validation", ["dev"]), ("test", ["test"])):
        assert find_files(str(tmp_path), split) == [str(tmp_path / f"{name}.jsonl") for name in names]


def test_saved_datasets(tmp_path):
    rows = datasets.Dataset.from_list(ROWS)
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": rows.select([0]), "test": rows.select([1])}).save_to_disk(tmp_path / "parts")
    assert load_rows(str(tmp_path / "one")).to_list() == ROWS
    assert load_rows(str(tmp_path / "parts")).to_list() == ROWS[:1]
    assert load_rows(str(tmp_path / "parts"), "test").to_list() == ROWS[1:]
    with pytest.raises(ValueError, match="the parts train, test, none of which is 'validation'"):
        load_rows(str(tmp_path / "parts"), "validation")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b"", r"a\.jsonl' is empty"),
        ("a.jsonl", b"\n \n", r"a\.jsonl is empty"),
        ("a.jsonl.gz", gzip.compress(b"", mtime=0), r"a\.jsonl\.gz is empty"),
        ("a.jsonl", b'{"a": 1}\n{"a": }\n', r"a\.jsonl, line 2, byte 7: Expecting value"),
        ("a.jsonl", '{"ä": 1}\n{"ä": }\n'.encode(), r"line 2, byte 8: Expecting value"),
        ("a.jsonl", b"[1, 2]\n[3, 4]\n", "line 1 has no fields"),
        ("a.json", b'[{"a": 1},\n {"a"}]', r"line 2, byte 6: Expecting ':'"),
        ("a.csv", b"a,b\n1,2\n1,2,3\n", "Expected 2 fields in line 3, saw 3"),
        ("a.csv", b"a,b\n1,\xff\n", "line 2, byte 3: it is not UTF-8"),
        ("a.jsonl.gz", b"not gzip", "Not a gzipped file"),
        ("a.parquet", b"no parquet", "Parquet magic bytes not found"),
        ("a.xlsx", b"x", "unknown format"),
    ],
)
def test_the_innermost_cause_is_named(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=said) as error:
        load_rows(str(tmp_path / name))
    assert "\n" not in str(error.value)


def test_places_without_data_are_named(tmp_path):
    (tmp_path / "a.csv").write_text(TABLE)
    (tmp_path / "a.jsonl").write_text(LINES)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty' is a folder without data files"):
        load_rows(str(tmp_path / "empty"))
    with pytest.raises(FileNotFoundError, match="matches no file"):
        load_rows(str(tmp_path / "*.parquet"))
    with pytest.raises(ValueError, match=r"several formats \(\.csv, \.jsonl\)"):
        load_rows(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_rows(str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="is no file or folder here, nor a dataset of the hub"):
        load_rows("nothing_of_that_name")


def test_the_hash_is_of_values_and_their_order(tmp_path):
    (tmp_path / "a.jsonl").write_text(LINES)
    (tmp_path / "a.csv").write_text(TABLE)
    (tmp_path / "b.jsonl").write_text("".join(reversed(LINES.splitlines(keepends=True))))
    (tmp_path / "c.jsonl").write_text(LINES.replace("dog", "cat"))
    a, table, turned, other = (
        content_hash(load_rows(str(tmp_path / name))) for name in ("a.jsonl", "a.csv", "b.jsonl", "c.jsonl")
    )
    assert a == table
    assert len({a, turned, other}) == 3
