"""The pictures of the frontier study: loss against what it costs."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence

from eval.harness.statistics import mean_and_error
from peft_scalora.plots import finish_panel, panels, save_png

from .frontier_report import BASELINE, Cell, Cells, cells_of
from .frontier_runs import Run

CURVES = (BASELINE, "ScaLoRA shrink", "ScaLoRA column")
MARKERS = "sv^<>DPX*phd"
OVERHEAD = "results/overhead/overhead.json"
# Methods of rank r (rsLoRA: r + R) -> rows of eval/overhead.py.
TIMED = {
    "LoRA": "lora",
    "ScaLoRA shrink": "scalora merged, I=10",
    "ScaLoRA shrink, I = 1": "scalora merged, I=1",
    "DoRA": "dora",
    "HiRA": "hira",
    "rsLoRA": "lora r+R",
}


def draw(runs: Mapping[Run, dict], suite: str, path: str) -> None:
    """Write a picture of loss against trained numbers, one panel a length, with what bounds it as lines."""
    cells = cells_of(runs, suite)
    lengths = sorted({steps for _, _, steps in cells})
    counted = {run.method: result["loss"] for run, result in runs.items() if run.suite == suite and not run.steps}
    best_counted = min(counted, key=counted.get)
    figure, axes = panels(len(lengths))
    figure.set_size_inches(4.6 * len(lengths) + 2.6, 4.6)
    for axis, steps in zip(axes[0], lengths):
        for index, method in enumerate(_methods(cells)):
            found = [cell for (name, r, n), cell in sorted(cells.items()) if (name, n) == (method, steps) and r]
            if found:
                _draw_method(axis, method, index, found)
        if ("full", 0, steps) in cells:
            axis.axhline(cells["full", 0, steps].mean, color="black", linestyle="--", label="full training")
        axis.axhline(counted[best_counted], color="gray", linestyle=":", label=best_counted)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:,.0f}")
        finish_panel(
            axis, f"{steps} steps", "trained numbers (equal ones side by side)", "held-out nats a byte", legend=False
        )
    fullest = max(axes[0], key=lambda axis: len(axis.get_legend_handles_labels()[1]))
    axes[0][-1].legend(*fullest.get_legend_handles_labels(), frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    save_png(figure, path)


def _methods(cells: Cells) -> list[str]:
    """Return the methods, those with a curve first; of ScaLoRA's variants only these."""
    others = dict.fromkeys(method for method, _, _ in cells if not method.startswith("ScaLoRA"))
    return [*CURVES, *(name for name in others if name not in CURVES)]


def _draw_method(axis, method: str, index: int, found: Sequence[Cell]) -> None:
    """Draw the losses with their errors: a curve over the ranks, or marks, each a little beside the others."""
    is_curve = method in CURVES
    style = {"fmt": "o-", "zorder": 3} if is_curve else {"fmt": MARKERS[index % len(MARKERS)], "alpha": 0.8}
    losses = [mean_and_error(list(cell.losses.values())) for cell in found]
    means, errors = zip(*((mean, error or 0) for mean, error in losses))
    aside = 1.0 if is_curve else 2 ** (0.06 * (index - len(CURVES) + 1))
    numbers = [aside * cell.numbers for cell in found]
    axis.errorbar(numbers, means, errors, label=method, color=f"C{index % 10}", markersize=5, capsize=2, **style)


def step_times(path: str = OVERHEAD) -> dict[str, dict[str, float]]:
    """Return what eval/overhead.py found: row -> median, low and high ratio of a step's time to LoRA's.

    Nothing where it has not measured ScaLoRA with a merged accumulator.
    """
    if not os.path.exists(path):
        return {}
    with open(path, encoding="utf-8") as file:
        summary = json.load(file)["summary"]
    return summary if TIMED["ScaLoRA shrink"] in summary else {}


def draw_step_time(runs: Mapping[Run, dict], suite: str, r: int, times: Mapping, path: str) -> None:
    """Write a picture of the loss of rank r after the longest training against the step time over LoRA's."""
    cells = cells_of(runs, suite)
    steps = max(steps for _, rank, steps in cells if rank == r)
    figure, axes = panels(1)
    figure.set_size_inches(6.4, 3.6)
    axis = axes[0][0]
    for index, (method, row) in enumerate(TIMED.items()):
        ranks = [rank for name, rank, n in cells if (name, n) == (method, steps) and rank >= r]
        if ranks and row in times:
            cell = cells[method, min(ranks), steps]
            _draw_time(axis, f"{method}, r = {min(ranks)}", index, times[row], cell)
    finish_panel(axis, f"{steps} steps", "step time over LoRA's", "held-out nats a byte", legend=False)
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    save_png(figure, path)


def _draw_time(axis, label: str, index: int, time: Mapping[str, float], cell: Cell) -> None:
    spread = [[time["median"] - time["low"]], [time["high"] - time["median"]]]
    error = mean_and_error(list(cell.losses.values()))[1]
    axis.errorbar(time["median"], cell.mean, error, spread, fmt="o", label=label, color=f"C{index}", capsize=2)
