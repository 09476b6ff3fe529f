"""Rows of the evaluation harness: what is refused, with the place, and what is recorded."""

import gzip
import hashlib
import json

import pytest

from eval.harness.rows import DataError, Field, Source, load, split_dev

FIELDS = {"sentence": Field(str), "label": Field(int, (0, 1))}
SOURCE = Source("task/train.jsonl.gz", "hub/name")
ROWS = [{"sentence": f"row {i}", "label": i % 2, "other": None} for i in range(10)]


def write(folder, lines: list[str], cut: int | None = None) -> str:
    """`lines` as the file that `SOURCE` names, cut to so many bytes."""
    path = folder / SOURCE.local
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(gzip.compress("".join(line + "\n" for line in lines).encode())[:cut])
    return str(folder)


def test_rows_are_those_of_the_file(tmp_path):
    rows = load(SOURCE, write(tmp_path, [json.dumps(row) for row in ROWS]), FIELDS)
    assert list(rows) == ROWS and len(rows) == 10 and rows[3] == ROWS[3]


def test_plain_files_are_read_and_have_the_same_hash(tmp_path):
    lines = [json.dumps(row) for row in ROWS]
    packed = load(SOURCE, write(tmp_path, lines), FIELDS)
    (tmp_path / "plain.jsonl").write_text("\n".join(lines) + "\n")
    plain = load(Source("plain.jsonl", "hub/name"), str(tmp_path), FIELDS)
    by_hand = hashlib.sha256("".join(json.dumps(row, sort_keys=True) + "\n" for row in ROWS).encode()).hexdigest()
    assert packed.record == {"source": "task/train.jsonl.gz", "rows": 10, "sha256": by_hand}
    assert plain.record["sha256"] == by_hand
    assert plain.part(2).record["sha256"] != by_hand


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"label": None}, "field 'label' is missing"),
        ({"label": 2}, "field 'label' is 2, not one of 0, 1"),
        ({"label": "1"}, "field 'label' is '1', not of type int"),
        ({"label": True}, "field 'label' is True, not of type int"),
        ({"sentence": "  "}, "field 'sentence' is empty"),
        ({"sentence": 3}, "field 'sentence' is 3, not of type str"),
    ],
)
def test_a_bad_field_is_named_with_file_and_row(tmp_path, change, complaint):
    rows = [*ROWS[:4], ROWS[4] | change, *ROWS[5:]]
    with pytest.raises(DataError) as caught:
        load(SOURCE, write(tmp_path, [json.dumps(row) for row in rows]), FIELDS)
    message = str(caught.value)
    assert SOURCE.local in message and "row 5:" in message and complaint in message


@pytest.mark.parametrize("label", ["NaN", "Infinity"])
def test_a_score_that_is_no_number_is_refused(tmp_path, label):
    lines = ['{"sentence": "a b", "label": 1}', f'{{"sentence": "a b", "label": {label}}}']
    with pytest.raises(DataError, match=r"row 2: field 'label' is \w+, not a finite number"):
        load(SOURCE, write(tmp_path, lines), {"label": Field(float)})


def test_wrong_columns_are_named_with_those_found(tmp_path):
    folder = write(tmp_path, [json.dumps({"text": "a", "label": 0})])
    with pytest.raises(DataError, match=r"row 1: field 'sentence' is missing \(the row's fields: text, label\)"):
        load(SOURCE, folder, FIELDS)


def test_a_file_that_is_cut_short_is_named_with_the_row(tmp_path):
    lines = [json.dumps({"sentence": hashlib.sha256(bytes([i])).hexdigest(), "label": 0}) for i in range(200)]
    with pytest.raises(DataError, match=r"train\.jsonl\.gz, row \d+: the file is damaged or cut short"):
        load(SOURCE, write(tmp_path, lines, cut=2000), FIELDS)


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        (['{"sentence": "a", "label": 0}', '{"sentence": '], "row 2: not JSON"),
        (['["a", 0]'], "row 1: not an object with named fields but list"),
        ([], "has no row"),
    ],
)
def test_lines_that_are_no_rows(tmp_path, lines, complaint):
    with pytest.raises(DataError, match=complaint):
        load(SOURCE, write(tmp_path, lines), FIELDS)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(DataError, match=r"task/train\.jsonl\.gz does not exist: --data-dir"):
        load(SOURCE, str(tmp_path), FIELDS)


def test_dev_rows_are_taken_out_of_the_training_rows(tmp_path):
    rows = load(SOURCE, write(tmp_path, [json.dumps(row) for row in ROWS]), FIELDS)
    train, dev = split_dev(rows, 3)
    names = [row["sentence"] for row in (*train, *dev)]
    assert len(dev) == 3 and sorted(names) == sorted(row["sentence"] for row in ROWS)
    fewer, same = split_dev(rows, 3, train_rows=2)
    assert list(fewer) == list(train[:2]) and list(same) == list(dev)


@pytest.mark.parametrize("count", [-1, 0, 9])
def test_training_rows_that_are_not_there_are_refused(tmp_path, count):
    rows = load(SOURCE, write(tmp_path, [json.dumps(row) for row in ROWS]), FIELDS)
    assert len(split_dev(rows, 2, 8)[0]) == 8
    with pytest.raises(ValueError, match=f"train_rows={count} must be from 1 to 8, the other rows of "):
        split_dev(rows, 2, count)


@pytest.mark.parametrize("count", [0, 6])
def test_too_many_dev_rows_are_refused(tmp_path, count):
    rows = load(SOURCE, write(tmp_path, [json.dumps(row) for row in ROWS]), FIELDS)
    with pytest.raises(ValueError, match=f"dev_rows={count} must be from 1 to half of the 10 rows"):
        split_dev(rows, count)
