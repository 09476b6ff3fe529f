"""Markdown tables, read back cell by cell."""

import re

import pytest

from peft_scalora.files.tables import markdown


def cells(line: str) -> list[str]:
    return [cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def test_a_table_holds_its_cells():
    header = ["", "learning rate", "a | b"]
    rows = [["lora", "1e-3", ""], ["x|y", "two\nlines", "α = 2"]]
    lines = markdown(header, rows).split("\n")
    assert len(lines) == 4 and cells(lines[1]) == ["---"] * 3
    assert [cells(line) for line in (lines[0], *lines[2:])] == [header, rows[0], ["x|y", "two lines", "α = 2"]]


def test_a_row_of_another_length_is_refused():
    with pytest.raises(ValueError, match=r"row \['a'\] has 1 cells, and the header \['x', 'y'\] has 2"):
        markdown(["x", "y"], [["a", "b"], ["a"]])
