"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table, without a newline at its end.

    Args:
        header: the columns' names; they may be empty.
        rows: one cell a column. A vertical bar within a cell is escaped, and a line break becomes a space.

    Raises:
        ValueError: a row has not as many cells as the header.
    """
    lines = [_line(header), "|" + "---|" * len(header)]
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"row {list(row)} has {len(row)} cells, and the header {list(header)} has {len(header)}.")
        lines.append(_line(row))
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    escaped = [" ".join(cell.splitlines()).replace("|", r"\|") for cell in cells]
    return f"| {' | '.join(escaped)} |"
