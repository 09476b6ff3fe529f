"""The table and the plot of the runs of the Gauss-Newton study."""

from __future__ import annotations

import os
from collections.abc import Sequence

from eval.harness.statistics import median_and_range
from peft_scalora.files.atomic import replace_file
from peft_scalora.files.tables import markdown
from peft_scalora.plots import finish_panel, panels, save_png

from .gauss_newton_run import METHODS, Setting

HEADER = ("", "learning rate (tried)", "seeds", "steps", "million tokens", "CPU seconds")
AXES = {  # a field of a run's points -> its factor and name in the plot
    "step": (1, "steps of one large batch"),
    "tokens": (1e-6, "million tokens"),
    "seconds": (1, "CPU seconds"),
}


def steps_to_target(result: dict) -> float:
    """Return the first step at or below the target, infinity if there is none."""
    target = result["settings"]["target"]
    return next((point["step"] for point in result["points"] if point["loss"] <= target), float("inf"))


def merit(result: dict) -> tuple[float, float]:
    """Return what the best run has least of: steps to the target, then loss."""
    return steps_to_target(result), result["points"][-1]["loss"]


def runs_of(runs: Sequence[dict], method: str, inner_steps: int) -> list[dict]:
    """Return the runs of one method at one size of batches."""
    return [r for r in runs if (r["settings"]["method"], r["settings"]["inner_steps"]) == (method, inner_steps)]


def best_runs(runs: Sequence[dict], method: str, inner_steps: int) -> list[dict]:
    """Return one run a seed, at the rate that is best on seed 0."""
    found = runs_of(runs, method, inner_steps)
    grid = [r for r in found if r["settings"]["seed"] == 0]
    if not grid:
        return []
    rate = min(grid, key=merit)["settings"]["learning_rate"]
    return sorted((r for r in found if r["settings"]["learning_rate"] == rate), key=lambda r: r["settings"]["seed"])


def table(runs: Sequence[dict], inner_steps: int) -> str:
    """Return a Markdown table: steps, tokens and CPU seconds to the target, median and range over seeds."""
    rows = []
    for method in METHODS:
        best = best_runs(runs, method, inner_steps)
        if best:
            settings = [r["settings"] for r in runs_of(runs, method, inner_steps)]
            tried = ", ".join(f"{rate:g}" for rate in sorted({s["learning_rate"] for s in settings if s["seed"] == 0}))
            rate = f"{best[0]['settings']['learning_rate']:g} ({tried})"
            rows.append([method, rate, str(len(best)), *_cost(best)])
    return markdown(HEADER, rows)


def _cost(best: Sequence[dict]) -> list[str]:
    """Return steps, tokens and CPU seconds to the target, or how far it was missed."""
    ends = [r["points"][-1] for r in best]
    steps = [steps_to_target(r) for r in best]
    if min(steps) == float("inf"):
        return [f"more than {ends[0]['step']} (loss {ends[0]['loss']:.2f})", "", ""]
    most = max(end["step"] for end in ends)
    return [
        median_and_range(steps, ".0f").replace("inf", f"more than {most}"),
        median_and_range([end["tokens"] / 1e6 for end in ends], ".2f"),
        median_and_range([end["seconds"] for end in ends], ".0f"),
    ]


def draw(path: str, runs: Sequence[dict], inner_steps: int, target: float) -> None:
    """Plot held-out loss against steps, tokens and CPU seconds; the best rate of each method, all seeds."""
    figure, (axes,) = panels(len(AXES))
    for axis, (name, (factor, label)) in zip(axes, AXES.items()):
        for index, method in enumerate(METHODS):
            for number, result in enumerate(best_runs(runs, method, inner_steps)):
                values = [point[name] * factor for point in result["points"]]
                losses = [point["loss"] for point in result["points"]]
                axis.plot(values, losses, color=f"C{index}", alpha=0.8, label=None if number else method)
        axis.axhline(target, color="black", linewidth=0.8, linestyle=":")
        axis.set(xscale="log", ylim=(target - 0.15, 5))
        finish_panel(axis, "Held-out loss", label, "nats a byte")
    save_png(figure, path)


def tables(runs: Sequence[dict]) -> str:
    """Return a table for each size of batches, under its size."""
    texts = []
    for inner_steps in sorted({r["settings"]["inner_steps"] for r in runs}, reverse=True):
        sequences = inner_steps * Setting.micro_batch
        texts.append(f"Batches of {sequences} sequences (N = {inner_steps}):\n\n{table(runs, inner_steps)}\n")
    return "\n".join(texts)


def write_report(folder: str, runs: Sequence[dict]) -> str:
    """Write study.md and study.png into the folder, and return the tables."""
    text = tables(runs)
    replace_file(os.path.join(folder, "study.md"), text)
    draw(os.path.join(folder, "study.png"), runs, Setting.inner_steps, runs[0]["settings"]["target"])
    return text
