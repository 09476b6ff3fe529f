"""The tables and the picture of the frontier study, from its runs."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from eval.harness.statistics import mean_and_error, paired_seeds
from peft_scalora.plots import finish_panel, panels, save_png

from .frontier_runs import SEARCH_SEED, Run

BASELINE = "LoRA"
RESAMPLES = 2000


class Cell(NamedTuple):
    """One method of one rank after one length of training: its best learning rate, and what the other seeds gave."""

    rate: int
    losses: dict[int, float]  # seed -> held-out loss
    results: list[dict]

    @property
    def mean(self) -> float:
        """Return the mean loss over the seeds."""
        return mean_and_error(list(self.losses.values()))[0]


Cells = dict[tuple[str, int, int], Cell]  # (method, r, steps) -> Cell


def best_rate(losses: Mapping[int, float | None], name: str) -> int:
    """Return the rate with the lowest loss.

    Raises:
        ValueError: a neighbour of the best on the grid was not tried.
    """
    finite = {rate: math.inf if loss is None else loss for rate, loss in losses.items()}
    best = min(finite, key=finite.get)
    if not {best - 1, best + 1} <= finite.keys():
        raise ValueError(f"{name}: the best learning rate, 10^({best}/4), is at an end of the grid: go on with `run`.")
    return best


def cells_of(runs: Mapping[Run, dict], suite: str) -> Cells:
    """Return what the runs of a suite say about every method, rank and length that has seeds beside the search's."""
    searched = defaultdict(dict)
    told = defaultdict(lambda: defaultdict(list))
    for run, result in runs.items():
        if run.suite != suite or not run.steps:
            continue
        key = run.method, run.r, run.steps
        if run.seed == SEARCH_SEED:
            searched[key][run.rate] = result["loss"]
        else:
            told[key][run.rate].append(result)
    cells = {}
    for key, losses in searched.items():
        results = told[key][best_rate(losses, "{} of rank {}, {} steps".format(*key))]
        if results:
            rate = results[0]["rate"]
            cells[key] = Cell(rate, {result["seed"]: result["loss"] for result in results}, results)
    return cells


def _keys(cells: Cells) -> tuple[list[tuple[str, int]], list[int]]:
    """Return the methods with their ranks, by rank, and the lengths."""
    pairs = dict.fromkeys((method, r) for method, r, _ in cells)
    return sorted(pairs, key=lambda pair: pair[1]), sorted({steps for _, _, steps in cells})


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# What else is told of the longest training: a result's name, the column's title and its format.
FURTHER = (("base_loss", "loss on the old text", ".3f"), ("recall", "recalled", ".1%"))


def loss_table(cells: Cells, fixed: Mapping[str, dict]) -> str:
    """Return the held-out losses: mean ± standard error (seeds; learning rate), then what needs no training."""
    pairs, lengths = _keys(cells)
    measured = {name for cell in cells.values() for result in cell.results for name in result}
    further = [column for column in FURTHER if column[0] in measured]
    rows = []
    for name, result in fixed.items():
        told = [format(result[key], style) if key in result else "" for key, _, style in further]
        rows.append([name, "", "", *[f"{result['loss']:.3f}"] * len(lengths), *told])
    for method, r in pairs:
        found = [cells.get((method, r, steps)) for steps in lengths]
        last = [cell for cell in found if cell][-1]
        told = [format(mean_and_error([result[key] for result in last.results])[0], style) for key, _, style in further]
        numbers = f"{last.results[0]['parameters']:,}"
        rows.append([method, str(r or ""), numbers, *map(_loss_text, found), *told])
    head = ["method", "r", "trained numbers", *[f"{steps} steps" for steps in lengths]]
    return _table([*head, *(title for _, title, _ in further)], rows)


def _loss_text(cell: Cell | None) -> str:
    if cell is None:
        return ""
    mean, error = mean_and_error(list(cell.losses.values()))
    error = "" if error is None else f" ± {error:.4f}"
    return f"{mean:.4f}{error} ({len(cell.losses)}; {10 ** (cell.rate / 4):.2g})"


def difference_table(cells: Cells) -> str:
    """Return each method's loss less that of LoRA of the same rank on the same seeds, with the p-value."""
    pairs, lengths = _keys(cells)
    rows = []
    for method, r in pairs:
        found = [_difference(cells, method, r, steps) for steps in lengths]
        if method != BASELINE and any(found):
            rows.append([method, str(r), *found])
    return _table(["less LoRA of the same rank", "r", *[f"{n} steps" for n in lengths]], rows)


def _difference(cells: Cells, method: str, r: int, steps: int) -> str:
    ours, theirs = cells.get((method, r, steps)), cells.get((BASELINE, r, steps))
    if ours is None or theirs is None:
        return ""
    seeds = sorted(ours.losses.keys() & theirs.losses.keys())
    pairs = [(theirs.losses[seed], ours.losses[seed]) for seed in seeds]
    difference, p = paired_seeds(*zip(*pairs))
    error = mean_and_error([b - a for a, b in pairs])[1]
    return f"{difference:+.4f}" + ("" if p is None else f" ± {error:.4f} (p = {p:.2g})")


def effective_rank(ranks: Sequence[int], losses: Sequence[float], loss: float) -> float:
    """Return the rank at which LoRA's curve, a parabola in log r (a line through two), has this loss.

    The curve is followed beyond its ends along its slope there. nan where it never comes to this loss.
    """
    x = np.log2(ranks)
    curve = np.polynomial.Polynomial.fit(x, losses, min(2, len(ranks) - 1))
    fine = np.linspace(x[0], x[-1], 400)
    values = np.minimum.accumulate(curve(fine))
    if values[-1] <= loss <= values[0]:
        return float(2 ** np.interp(-loss, -values, fine))
    end = x[0] if loss > values[0] else x[-1]
    slope = curve.deriv()(end)
    return float(2 ** (end + (loss - curve(end)) / slope)) if slope < 0 else math.nan


def effective_rank_interval(cells: Cells, method: str, r: int, steps: int) -> tuple[float, float, float] | None:
    """Return the effective rank of a method at equal training, and its 95% interval when seeds are drawn anew."""
    ours = cells.get((method, r, steps))
    ranks = sorted(rank for name, rank, length in cells if name == BASELINE and length == steps)
    if ours is None or len(ranks) < 2:
        return None
    curve = [np.array(list(cells[BASELINE, rank, steps].losses.values())) for rank in ranks]
    mine = np.array(list(ours.losses.values()))
    value = effective_rank(ranks, [losses.mean() for losses in curve], mine.mean())
    rng = np.random.default_rng(0)
    drawn = [
        effective_rank(ranks, [rng.choice(losses, len(losses)).mean() for losses in curve], _redrawn(mine, rng))
        for _ in range(RESAMPLES)
    ]
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    return value, float(low), float(high)


def _redrawn(losses: np.ndarray, rng: np.random.Generator) -> float:
    return rng.choice(losses, len(losses)).mean()


def rank_table(cells: Cells) -> str:
    """Return the effective ranks at equal training, with 95% intervals."""
    pairs, lengths = _keys(cells)
    rows = []
    for method, r in pairs:
        if method == BASELINE or not r:
            continue
        found = [effective_rank_interval(cells, method, r, steps) for steps in lengths]
        if any(found):
            rows.append([method, str(r), *("" if x is None else "{:.1f} ({:.1f} to {:.1f})".format(*x) for x in found)])
    return _table(["effective rank at equal training", "r", *[f"{n} steps" for n in lengths]], rows)


def report(runs: Mapping[Run, dict], suite: str) -> str:
    """Return the tables of a suite in Markdown."""
    cells = cells_of(runs, suite)
    fixed = {run.method: result for run, result in runs.items() if run.suite == suite and not run.steps}
    return "\n\n".join([loss_table(cells, fixed), difference_table(cells), rank_table(cells)]) + "\n"


def draw(runs: Mapping[Run, dict], suite: str, path: str) -> None:
    """Write a picture of loss against rank, one panel a length: LoRA's curve, and the others where they are."""
    cells = cells_of(runs, suite)
    pairs, lengths = _keys(cells)
    figure, axes = panels(len(lengths))
    for axis, steps in zip(axes[0], lengths):
        for method in dict.fromkeys(method for method, _ in pairs):
            ranks = sorted(r for name, r, n in cells if name == method and n == steps and r)
            if ranks:
                _draw_method(axis, method, ranks, [cells[method, r, steps] for r in ranks])
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")
        finish_panel(axis, f"{steps} steps", "rank r", "held-out nats a byte")
    save_png(figure, path)


def _draw_method(axis, method: str, ranks: Sequence[int], found: Sequence[Cell]) -> None:
    errors = [mean_and_error(list(cell.losses.values()))[1] or 0 for cell in found]
    line = "-" if method == BASELINE else ":"
    axis.errorbar(ranks, [cell.mean for cell in found], errors, fmt=f"o{line}", label=method, markersize=4, capsize=2)
