"""The tables of the frontier study that README and docs/method.md show."""

from __future__ import annotations

from collections.abc import Mapping

from eval.harness.statistics import mean_and_error

from .frontier_report import BASELINE, Cell, Cells, difference

LENGTHS = (300, 1200)
# (method, rank) -> what readers call it. A method that was not trained at both lengths has no row.
README_ROWS = {
    ("LoRA", 2): "LoRA, r = 2",
    ("ScaLoRA shrink", 2): "**ScaLoRA, r = 2**",
    ("LoRA", 4): "LoRA, r = 4",
    ("ScaLoRA shrink", 4): "**ScaLoRA, r = 4**",
    ("ScaLoRA column", 4): "ScaLoRA with the paper's column rule, r = 4",
    ("PiSSA", 4): "PiSSA, r = 4",
    ("MoRA", 4): "MoRA, r = 4",
    ("HiRA", 4): "HiRA, r = 4",
    ("GraLoRA", 4): "GraLoRA, r = 4",
    ("ReLoRA", 4): "ReLoRA, r = 4",
    ("DoRA", 4): "DoRA, r = 4",
    ("LoRA", 8): "LoRA, r = 8",
    ("ScaLoRA shrink", 8): "**ScaLoRA, r = 8**",
    ("LoRA", 16): "LoRA, r = 16",
    ("ScaLoRA shrink", 16): "**ScaLoRA, r = 16**",
    ("LoRA", 32): "LoRA, r = 32",
    ("full", 0): "the weights themselves",
}
RULE_ROWS = {
    ("LoRA", 4): "LoRA",
    ("ScaLoRA column", 4): '`"column"`, the paper\'s rule, norm² 1/3',
    ("ScaLoRA column, norm² 1", 4): '`"column"`, norm² 1',
    ("ScaLoRA shrink, norm² 1/3", 4): '`"shrink"`, norm² 1/3',
    ("ScaLoRA shrink", 4): '`"shrink"`, norm² 1, the default',
    ("ScaLoRA shrink, norm² 3", 4): '`"shrink"`, norm² 3',
}


def headline_table(cells: Cells, names: Mapping[tuple[str, int], str]) -> str:
    """Return the losses of some methods and their difference to LoRA of the same rank, in Markdown."""
    lines = [
        "| | trained numbers | 300 steps | 1,200 steps | less LoRA of the same r, 1,200 steps |",
        "|---|---|---|---|---|",
    ]
    for (method, r), name in names.items():
        found = [cells.get((method, r, steps)) for steps in LENGTHS]
        if all(found):
            less = difference(cells, (method, r), (BASELINE, r), LENGTHS[-1]) if method != BASELINE else ""
            lines.append(f"| {name} | {found[0].numbers:,} | {' | '.join(map(_loss, found))} | {less} |")
    return "\n".join(lines)


def _loss(cell: Cell) -> str:
    mean, error = mean_and_error(list(cell.losses.values()))
    return f"{mean:.3f} ± {error:.3f}"
