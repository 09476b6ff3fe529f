"""Draw a run, hidden states by depth, and searches. Needs the extra `plots` (matplotlib)."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from statistics import median

from ..plots import finish_panel, panels, save_png
from .instability import LEVEL_WINDOW, InstabilityReport, LossMonitor

MARKS = {"spike": "tab:orange", "divergence": "tab:red", "non-finite": "black"}
LOG_SCALE_FROM = 20  # times the smallest loss


def plot_run(path: str | os.PathLike, monitor) -> None:
    """Draw a `StabilityMonitor`: gradient norm against step, histogram of the norms, loss with limit and events."""
    figure, ((by_step, histogram, loss),) = panels(3)
    _plot_norms(by_step, monitor)
    _plot_histogram(histogram, monitor)
    report = plot_judged(loss, monitor.loss_steps, monitor.losses)
    verdict = f": {report.verdict}" if monitor.losses else ""
    finish_panel(loss, f"Loss, limit and events{verdict}", "optimizer step", "loss")
    save_png(figure, path)


def _plot_norms(axis, monitor) -> None:
    clipped = monitor.clipped
    for name, wanted, colour in (("kept", False, "tab:blue"), ("clipped", True, "tab:orange")):
        points = [(s, n) for s, n, c in zip(monitor.steps, monitor.norms, clipped) if c is wanted and n > 0]
        if points:
            axis.plot(*zip(*points), ".", color=colour, markersize=3, label=name)
    thresholds = [(s, t) for s, t in zip(monitor.steps, monitor.thresholds) if t is not None]
    if thresholds:
        axis.plot(*zip(*thresholds), color="black", linewidth=1.2, label="threshold")
    axis.set_yscale("log")
    finish_panel(axis, "Unclipped gradient norm", "optimizer step", "L2 norm")


def _plot_histogram(axis, monitor) -> None:
    norms = [norm for norm in monitor.norms if math.isfinite(norm) and norm > 0]
    if norms:
        low, high = math.log10(min(norms)), math.log10(max(norms))
        count = 20
        edges = [10 ** (low + (high - low + 1e-9) * i / count) for i in range(count + 1)]
        axis.hist(norms, bins=edges, color="tab:blue")
        axis.set_xscale("log")
    labelled = bool(monitor.thresholds) and monitor.thresholds[-1] is not None
    if labelled:
        axis.axvline(monitor.thresholds[-1], color="black", linewidth=1.2, label="last threshold")
    finish_panel(axis, "All norms", "L2 norm", "steps", legend=labelled)


def plot_judged(axis, steps: Sequence[int], losses: Sequence[float]) -> InstabilityReport:
    """Draw losses with what they are judged by, the limit of each step, and the events; return the judgement."""
    limits, report = judge(steps, losses)
    points = [(step, loss) for step, loss in zip(steps, losses) if math.isfinite(loss)]
    if points:
        axis.plot(*zip(*points), color="tab:blue", linewidth=1.2, label="loss")
        _choose_scale(axis, [loss for _, loss in points])
    if limits:
        axis.plot(*zip(*limits), color="black", linewidth=1.0, linestyle="--", label="limit")
    for kind, colour in MARKS.items():
        for number, event in enumerate(e for e in report.events if e.kind == kind):
            axis.axvspan(event.start, event.end + 1, color=colour, alpha=0.3, label=None if number else kind)
    return report


def judge(steps: Sequence[int], losses: Sequence[float]) -> tuple[list[tuple[int, float]], InstabilityReport]:
    """Return the limit that held at each step, from the fifth loss on, and what was found."""
    monitor = LossMonitor()
    limits = []
    for step, loss in zip(steps, losses):
        monitor.update(loss, step)
        if monitor.limit is not None:
            limits.append((step, monitor.limit))
    return limits, monitor.report()


def _choose_scale(axis, losses: Sequence[float]) -> None:
    """Take a logarithmic scale where a blow-up would flatten all the rest of a curve."""
    if 0 < LOG_SCALE_FROM * min(losses) < max(losses):
        axis.set_yscale("log")


def plot_depth(path: str | os.PathLike, profiles: Sequence, bound: Sequence[float] | None = None) -> None:
    """Draw mean absolute activation, variance and gradient norm by depth: first, middle and last `DepthProfile`."""
    figure, axes = panels(3)
    chosen = list({0: 0, len(profiles) // 2: 0, len(profiles) - 1: 0})
    titles = {
        "mean_abs": ("Hidden states", "mean absolute activation"),
        "variance": ("Variance", "variance over the features"),
        "gradient_norm": ("Gradient by hidden state", "L2 norm"),
    }
    for axis, (name, (title, label)) in zip(axes[0], titles.items()):
        for i in chosen:
            values = getattr(profiles[i], name)
            axis.plot(range(len(values)), values, marker=".", label=f"pass {profiles[i].forward_pass}")
        if name == "mean_abs" and bound is not None:
            axis.plot(range(len(bound)), bound, "--", color="black", linewidth=1.2, label="Peri-LN bound")
        axis.set_yscale("log")
        axis.xaxis.get_major_locator().set_params(integer=True)
        finish_panel(axis, title, "block", label)
    save_png(figure, path)


def plot_sweep(path: str | os.PathLike, sweep) -> None:
    """Draw a `SweepResult`: score against learning rate, losses of all runs with their events, and the check."""
    figure, ((score, losses, *check),) = panels(3 if sweep.check_losses else 2)
    points = list(zip(sweep.learning_rates, sweep.scores, sweep.unstable))
    finite = [(rate, value) for rate, value, _ in points if math.isfinite(value)]
    score.plot(*zip(*finite), color="tab:blue", marker=".", label="loss at the end")
    blown = [(rate, value) for rate, value, unstable in points if unstable and math.isfinite(value)]
    if blown:
        score.plot(*zip(*blown), "x", color="tab:red", label="unstable")
    highest = max(value for _, value in finite)
    lost = [rate for rate, value, _ in points if not math.isfinite(value)]
    if lost:
        score.plot(lost, [highest] * len(lost), "^", color="black", label="not finite")
    score.axvline(sweep.best_learning_rate, color="tab:green", linewidth=1.2, label="best")
    score.set_xscale("log")
    finish_panel(score, "Learning rates", "learning rate", "loss at the end")
    _plot_all_losses(losses, [None] * len(points), sweep.losses)
    finish_panel(losses, "Loss and limit of each run", "optimizer step", "loss, running median of 5", legend=False)
    _colour_bar(figure, losses, sweep.learning_rates)
    for axis in check:
        report = plot_judged(axis, range(1, len(sweep.check_losses) + 1), sweep.check_losses)
        finish_panel(axis, f"At twice the best: {report.verdict}", "optimizer step", "loss at every step")
    save_png(figure, path)


def _colour_bar(figure, axis, rates: Sequence[float]) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm

    colours = ScalarMappable(LogNorm(rates[0], rates[-1]), "viridis")
    figure.colorbar(colours, ax=axis, label="learning rate")


def plot_warmup(path: str | os.PathLike, warmup) -> None:
    """Draw a `WarmupResult`: losses of each warmup tried and their limits, one panel for each number of steps."""
    lengths = sorted({run.warmup_steps for run in warmup.runs})
    figure, axes = panels(len(lengths))
    for axis, steps in zip(axes[0], lengths):
        runs = [run for run in warmup.runs if run.warmup_steps == steps]
        names = [f"peak {run.learning_rate:.2g}: {run.verdict}" for run in runs]
        _plot_all_losses(axis, names, [run.losses for run in runs])
        axis.axvline(steps, color="black", linewidth=0.8, linestyle=":")
        finish_panel(axis, f"{steps} steps of warmup", "optimizer step", "loss, running median of 5")
    save_png(figure, path)


def _plot_all_losses(axis, names: Sequence[str | None], losses: Sequence[Sequence[float]]) -> None:
    """Draw each run, its limit and a cross where an event begins, coloured from low to high."""
    finite = []
    for name, run, colour in zip(names, losses, _colours(len(names))):
        limits, report = judge(range(1, len(run) + 1), run)
        smooth = _running_median(run)
        axis.plot(*zip(*smooth.items()), color=colour, linewidth=1.2, label=name)
        if limits:
            axis.plot(*zip(*limits), color=colour, linewidth=0.8, linestyle="--")
        starts = [event.start for event in report.events if event.start in smooth]
        axis.plot(starts, [smooth[start] for start in starts], "x", color="tab:red")
        finite += smooth.values()
    if finite:
        _choose_scale(axis, finite)


def _running_median(losses: Sequence[float]) -> dict[int, float]:
    """Return the median of the last five losses by step, at the steps whose loss is finite."""
    medians = {}
    for step, loss in enumerate(losses, 1):
        if math.isfinite(loss):
            window = losses[max(0, step - LEVEL_WINDOW) : step]
            medians[step] = median(x for x in window if math.isfinite(x))
    return medians


def _colours(count: int) -> list:
    from matplotlib import colormaps

    return [colormaps["viridis"](i / max(1, count - 1)) for i in range(count)]
