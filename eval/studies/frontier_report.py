"""The tables of the frontier study, from its runs."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from eval.harness.statistics import mean_and_error, paired_seeds

from .frontier_runs import SEARCH_SEED, Run

BASELINE = "LoRA"
# Whose difference to every other method is told.
DEFAULT = ("ScaLoRA shrink", 4)
RESAMPLES = 1000
NOT_BETTER = "†"


class Cell(NamedTuple):
    """One method of one rank after one length of training: its best learning rate, and what the other seeds gave."""

    rate: int
    losses: dict[int, float]  # seed -> held-out loss
    results: list[dict]

    @property
    def numbers(self) -> int:
        """Return how many numbers were trained."""
        return self.results[0]["parameters"]

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
    """Return the methods with their ranks, by the numbers that they train, and the lengths."""
    numbers = {(method, r): cell.numbers for (method, r, _), cell in cells.items()}
    return sorted(numbers, key=numbers.get), sorted({steps for _, _, steps in cells})


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# What else is told of the longest training: a result's name, the column's title and its format.
FURTHER = (("base_loss", "loss on the old text", ".3f"), ("recall", "recalled", ".1%"))


def loss_table(cells: Cells, fixed: Mapping[str, dict]) -> str:
    """Return the held-out losses: mean ± standard error (seeds; learning rate), then what needs no training."""
    pairs, lengths = _keys(cells)
    counted = min([result["loss"] for result in fixed.values()], default=math.inf)
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
        rows.append([method, str(r or ""), f"{last.numbers:,}", *(_loss_text(cell, counted) for cell in found), *told])
    head = ["method", "r", "trained numbers", *_titles(lengths)]
    return _table([*head, *(title for _, title, _ in further)], rows)


def _titles(lengths: Sequence[int]) -> list[str]:
    return [f"{steps} steps" for steps in lengths]


def _loss_text(cell: Cell | None, counted: float) -> str:
    if cell is None:
        return ""
    mean, error = mean_and_error(list(cell.losses.values()))
    error = "" if error is None else f" ± {error:.4f}"
    mark = NOT_BETTER if mean >= counted else ""
    return f"{mean:.4f}{mark}{error} ({len(cell.losses)}; {10 ** (cell.rate / 4):.2g})"


def difference_table(cells: Cells) -> str:
    """Return each method's loss less that of LoRA of the same rank on the same seeds, with the p-value."""
    pairs, lengths = _keys(cells)
    rows = []
    for method, r in pairs:
        found = [difference(cells, (method, r), (BASELINE, r), steps) for steps in lengths]
        if method != BASELINE and any(found):
            rows.append([method, str(r), *found])
    return _table(["less LoRA of the same rank", "r", *_titles(lengths)], rows)


def opponent_table(cells: Cells) -> str:
    """Return the loss of the default less that of every other method on the same seeds, with the p-value."""
    pairs, lengths = _keys(cells)
    rows = []
    for pair in pairs:
        found = [difference(cells, DEFAULT, pair, steps) for steps in lengths]
        if pair != DEFAULT and any(found):
            rows.append([pair[0], str(pair[1] or ""), *found])
    return _table(["{}, r = {}, less".format(*DEFAULT), "r", *_titles(lengths)], rows)


def difference(cells: Cells, ours: tuple[str, int], theirs: tuple[str, int], steps: int) -> str:
    """Return the loss of one (method, r) less that of another on the same seeds; empty where one has none."""
    first, second = cells.get((*theirs, steps)), cells.get((*ours, steps))
    if first is None or second is None:
        return ""
    seeds = sorted(first.losses.keys() & second.losses.keys())
    pairs = [(first.losses[seed], second.losses[seed]) for seed in seeds]
    difference, p = paired_seeds(*zip(*pairs))
    error = mean_and_error([b - a for a, b in pairs])[1]
    return f"{difference:+.4f}" + ("" if p is None else f" ± {error:.4f} (p = {p:.2g})")


def budget_table(cells: Cells) -> str:
    """Return the best method that trains no more numbers than LoRA of each rank, at every length, and its lead."""
    pairs, lengths = _keys(cells)
    rows = []
    for budget, r in ((_numbers(cells, pair), pair[1]) for pair in pairs if pair[0] == BASELINE):
        within = [pair for pair in pairs if _numbers(cells, pair) <= budget]
        rows.append([f"{budget:,}", str(r), *(_best(cells, within, r, steps) for steps in lengths)])
    return _table(["trained numbers, at most", "LoRA's r", *_titles(lengths)], rows)


def _numbers(cells: Cells, pair: tuple[str, int]) -> int:
    return next(cell.numbers for (method, r, _), cell in cells.items() if (method, r) == pair)


def _best(cells: Cells, pairs: Sequence[tuple[str, int]], r: int, steps: int) -> str:
    means = {pair: cells[(*pair, steps)].mean for pair in pairs if (*pair, steps) in cells}
    if not means:
        return ""
    best = min(means, key=means.get)
    text = f"{best[0]}, r = {best[1]}: {means[best]:.4f}"
    return text if best == (BASELINE, r) else f"{text}; {difference(cells, best, (BASELINE, r), steps)}"


def effective_rank(ranks: Sequence[int], losses: Sequence[float], loss: float) -> float:
    """Return the rank at which LoRA's losses, joined by lines over log r, come down to this loss.

    0 where the loss is above all of them, infinity where it is below.
    """
    falling = np.minimum.accumulate(losses)
    if loss > falling[0]:
        return 0.0
    if loss < falling[-1]:
        return math.inf
    return float(2 ** np.interp(-loss, -falling, np.log2(ranks)))


def effective_rank_interval(cells: Cells, method: str, r: int, steps: int) -> tuple[float, float, float] | None:
    """Return the effective rank of a method at equal training, and its 95% interval when seeds are drawn anew."""
    ours = cells.get((method, r, steps))
    ranks = _lora_ranks(cells, steps)
    if ours is None or len(ranks) < 2:
        return None
    rng = np.random.default_rng(0)
    curve = [cells[BASELINE, rank, steps] for rank in ranks]
    drawn_SR = np.stack([_drawn_means(cell, rng) for cell in curve], axis=1)
    drawn = [effective_rank(ranks, losses, loss) for losses, loss in zip(drawn_SR, _drawn_means(ours, rng))]
    low, high = np.percentile(drawn, [2.5, 97.5], method="nearest")
    return effective_rank(ranks, [cell.mean for cell in curve], ours.mean), float(low), float(high)


def _lora_ranks(cells: Cells, steps: int) -> list[int]:
    return sorted(rank for name, rank, length in cells if name == BASELINE and length == steps)


def _drawn_means(cell: Cell, rng: np.random.Generator) -> np.ndarray:
    losses = np.array(list(cell.losses.values()))
    return rng.choice(losses, (RESAMPLES, len(losses))).mean(1)


def rank_table(cells: Cells) -> str:
    """Return the effective ranks at equal training, with 95% intervals."""
    pairs, lengths = _keys(cells)
    rows = []
    for method, r in pairs:
        if method == BASELINE or not r:
            continue
        found = [_rank_text(cells, method, r, steps) for steps in lengths]
        if any(found):
            rows.append([method, str(r), *found])
    return _table(["effective rank at equal training", "r", *_titles(lengths)], rows)


def _rank_text(cells: Cells, method: str, r: int, steps: int) -> str:
    found = effective_rank_interval(cells, method, r, steps)
    if found is None:
        return ""
    ranks = _lora_ranks(cells, steps)
    ends = {0.0: f"< {ranks[0]}", math.inf: f"> {ranks[-1]}"}
    value, low, high = (ends.get(rank) or f"{rank:.1f}" for rank in found)
    return value if value == low == high else f"{value} ({low} to {high})"


def report(runs: Mapping[Run, dict], suite: str) -> str:
    """Return the tables of a suite in Markdown."""
    cells = cells_of(runs, suite)
    fixed = {run.method: result for run, result in runs.items() if run.suite == suite and not run.steps}
    losses = [loss_table(cells, fixed)]
    if NOT_BETTER in losses[0]:
        losses.append(f"{NOT_BETTER} not below the best of what needs no training")
    return "\n\n".join([*losses, *(table(cells) for table in TABLES)]) + "\n"


TABLES = (difference_table, opponent_table, budget_table, rank_table)
