"""Tables and plots of the runs of a sweep, from its JSONs alone.

    python -m eval.report results/glue/cola --baseline lora
    python -m eval.report results/glue/* results/commonsense --summary results/summary.md

Writes report.md, curves.png (loss and dev metric against step and seconds) and quality.png (metric against trainable
parameters and memory) into the folder. Runs that failed or are missing are shown as such. For every method: its best
learning rate by the dev metric; mean ± standard error over seeds; the difference to the baseline over the same seeds
(paired t-test) and the same rows (bootstrap); and the dev metric after the seconds of the baseline's run of the same
seed.
"""

from __future__ import annotations

import argparse
import glob
import os
import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from eval.harness.record import FINISHED, read
from eval.harness.statistics import mean_and_error, paired_rows, paired_seeds, running
from eval.harness.training import UNTRAINED
from eval.sweep import PLAN_NAME, best_rate, dev_value, next_rate
from peft_scalora.files.atomic import replace_file
from peft_scalora.files.tables import markdown
from peft_scalora.plots import finish_panel, panels, save_png

HEADER = [
    "",
    "learning rate (tried)",
    "seeds",
    "trainable",
    "rank",
    "{metric}",
    "over {baseline} (p; 95% of rows)",
    "dev {dev} at {baseline}'s steps",
    "within its seconds",
    "s a step",
    "MiB",
]


@dataclass
class Method:
    """All runs of one method, in a sweep."""

    name: str
    runs: list[dict]

    @property
    def failed(self) -> list[dict]:
        return [run for run in self.runs if run["status"] != FINISHED]

    @property
    def rates(self) -> dict[float, float]:
        """Return the dev value by learning rate, of the first seed."""
        first = [run for run in self.runs if run["settings"]["seed"] == 0]
        return {run["settings"]["learning_rate"]: dev_value(run) for run in first}

    @property
    def best(self) -> list[dict]:
        """Return the finished runs at the best rate, by seed."""
        if not self.rates:
            return []
        rate = best_rate(self.rates)
        found = [r for r in self.runs if r["status"] == FINISHED and r["settings"]["learning_rate"] == rate]
        return sorted(found, key=lambda run: run["settings"]["seed"])

    @property
    def at_edge(self) -> bool:
        return self.name != UNTRAINED and (len(self.rates) < 3 or next_rate(self.rates) is not None)


def load_sweep(folder: str) -> tuple[dict[str, Method], dict]:
    """Return a sweep's methods, in the order of its plan, and the plan; a method without a run has none.

    Raises:
        ValueError: its runs are not all of the same rows.
    """
    plan = read(os.path.join(folder, PLAN_NAME))
    methods = {}
    for name in plan["methods"]:
        paths = glob.glob(os.path.join(folder, f"{glob.escape(name.replace(',', '-'))}-lr*-seed*.json"))
        methods[name] = Method(name, [read(path) for path in sorted(paths)])
    finished = [run for method in methods.values() for run in method.runs if run["status"] == FINISHED]
    if any(run["data"] != finished[0]["data"] for run in finished):
        raise ValueError(f"{folder} has runs of other rows than its first: they cannot be compared.")
    return methods, plan


def scorer(run: dict) -> Callable[[np.ndarray, np.ndarray], float]:
    """Return the run's main metric of some of its rows: (predictions, row numbers) -> value."""
    family, _, task = run["task"].partition("/")
    if family == "commonsense":  # a mean over tasks, however many rows they have
        tasks = np.array(run["prediction_tasks"])
        return lambda predictions, rows: float(
            np.mean([predictions[tasks[rows] == name].mean() for name in np.unique(tasks[rows])])
        )
    if family != "glue":
        return lambda predictions, rows: float(predictions.mean())
    from eval.glue import score

    references = np.array(run["references"])

    def of_rows(predictions, rows):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a resample with one class only
            return score(task, predictions, references[rows])[run["metric"]]

    return of_rows


def final(run: dict) -> float:
    return run["metrics"][run["metric"]]


def dev_within(run: dict, unit: str, baseline: Method) -> float | None:
    """Return the dev metric after the baseline's "step"s or "seconds", of its run of this seed or its mean run.

    Between two points of the curve in proportion; None before the first.
    """
    by_seed = {other["settings"]["seed"]: other["curve"][-1][unit] for other in baseline.best}
    budget = by_seed.get(run["settings"]["seed"], statistics.fmean(by_seed.values()) if by_seed else 0.0)
    at = [point[unit] for point in run["curve"]]
    if budget < at[0]:
        return None
    return float(np.interp(budget, at, [point[run["dev_metric"]] for point in run["curve"]]))


def mean_of(values: list[float | None], digits: int = 3) -> str:
    if not values or None in values:
        return "none yet"
    mean, error = mean_and_error(values)
    return f"{mean:.{digits}f}" + (f" ± {error:.{digits}f}" if error is not None else "")


def difference(method: Method, baseline: Method) -> str:
    """Return the difference to the baseline over the seeds both have; the untrained model has one for all."""
    mine, theirs = ({run["settings"]["seed"]: run for run in m.best} for m in (method, baseline))
    if method.name == UNTRAINED and mine:
        mine = dict.fromkeys(theirs, method.best[0])
    seeds = sorted(set(mine) & set(theirs))
    if method is baseline or not seeds:
        return ""
    value, p = paired_seeds([final(theirs[s]) for s in seeds], [final(mine[s]) for s in seeds])
    first, second = (np.array([runs[s]["predictions"] for s in seeds]) for runs in (theirs, mine))
    low, high = paired_rows(first, second, scorer(mine[seeds[0]]))
    chance = "" if p is None else "p < 0.01; " if p < 0.01 else f"p = {p:.2f}; "
    return f"{value:+.3f} ({chance}{low:+.3f} to {high:+.3f})"


def row(method: Method, baseline: Method, seeds: int) -> list[str]:
    """Return the cells of one method."""
    if not method.runs:
        return [method.name, "not run"] + [""] * (len(HEADER) - 2)
    if not method.best:
        error = method.failed[0]["error"].partition("\n")[0]
        return [method.name, f"all failed: {error}"] + [""] * (len(HEADER) - 2)
    best = method.best
    tried = ", ".join(f"{rate:g}" for rate in sorted(method.rates)) + (", best at an end" if method.at_edge else "")
    failed = f", {len(method.failed)} failed" if method.failed else ""
    rank = best[0]["effective_rank"]
    steps = [(run["train_seconds"] - run.get("setup_seconds", 0.0)) / max(1, run["steps"]) for run in best]
    return [
        method.name,
        "" if method.name == UNTRAINED else f"{best[0]['settings']['learning_rate']:g} ({tried})",
        f"{len(best)} of {1 if method.name == UNTRAINED else seeds}{failed}",
        f"{best[0]['trainable_parameters']:,}",
        "" if rank is None else f"{statistics.fmean(run['effective_rank'] for run in best):.1f}",
        mean_of([final(run) for run in best]),
        difference(method, baseline),
        mean_of([dev_within(run, "step", baseline) for run in best]),
        mean_of([dev_within(run, "seconds", baseline) for run in best]),
        f"{statistics.median(steps):.3f}",
        f"{statistics.median(run['peak_memory_bytes'] for run in best) / 2**20:.0f}",
    ]


def table(folder: str, baseline: str) -> str:
    """Return the Markdown table of a sweep."""
    methods, plan = load_sweep(folder)
    if baseline not in methods:
        raise ValueError(f"baseline={baseline!r} is not in the sweep: {', '.join(methods)}.")
    some = next((run for method in methods.values() for run in method.best), None)
    if some is None:
        raise ValueError(f"{folder} has no finished run.")
    names = {"metric": some["metric"], "dev": some["dev_metric"].removeprefix("dev_"), "baseline": baseline}
    header = [cell.format(**names) for cell in HEADER]
    return markdown(header, [row(method, methods[baseline], plan["seeds"]) for method in methods.values()])


def summary(folders: list[str]) -> str:
    """Return one Markdown table of several sweeps: a method a line, a task a column."""
    sweeps = [load_sweep(folder)[0] for folder in folders]
    names = list(dict.fromkeys(name for methods in sweeps for name in methods))
    runs = [next(run for method in methods.values() for run in method.best) for methods in sweeps]
    header = ["", *(f"{run['task'].removeprefix('glue/')} ({run['metric']})" for run in runs)]
    rows = []
    for name in names:
        cells = [mean_of([final(run) for run in m[name].best]) if name in m else "" for m in sweeps]
        rows.append([name, *cells])
    return markdown(header, rows)


def plot_curves(methods: dict[str, Method], path: str) -> None:
    """Plot training loss and dev metric, means over seeds, against step and against seconds."""
    figure, (axes,) = panels(4)
    drawn = [method for method in methods.values() if method.best and method.name != UNTRAINED]
    name = drawn[0].best[0]["dev_metric"] if drawn else "dev metric"
    for method in drawn:
        steps, seconds, losses = means_over_seeds([run["losses"] for run in method.best])
        smooth = running(statistics.fmean, losses)
        curves = [[(point["step"], point["seconds"], point[name]) for point in run["curve"]] for run in method.best]
        dev_steps, dev_seconds, values = means_over_seeds(curves)
        lines = ((steps, smooth), (seconds, smooth), (dev_steps, values), (dev_seconds, values))
        for axis, line in zip(axes, lines):
            axis.plot(*line, label=method.name, linewidth=1.2)
    titles = ("Training loss, mean of 10 steps", "The same", "Dev rows", "The same")
    for number, (axis, title) in enumerate(zip(axes, titles)):
        x = "seconds of training" if number % 2 else "optimizer step"
        finish_panel(axis, title, x, "loss" if number < 2 else name)
    save_png(figure, path)


def means_over_seeds(seeds: list[list[Sequence[float]]]) -> list[tuple[float, ...]]:
    """Return each column of the mean curve, where every seed has a list of points (x, ..., y)."""
    points = [[statistics.fmean(values) for values in zip(*at)] for at in zip(*seeds)]
    return list(zip(*points))


def plot_quality(methods: dict[str, Method], path: str) -> None:
    """Plot the metric with its error against trainable parameters and against memory."""
    figure, axes = panels(2)
    for method in methods.values():
        if not method.best:
            continue
        mean, error = mean_and_error([final(run) for run in method.best])
        memory = statistics.median(run["peak_memory_bytes"] for run in method.best) / 2**20
        for axis, x in zip(axes[0], (method.best[0]["trainable_parameters"], memory)):
            axis.errorbar(x, mean, yerr=error, fmt="o", capsize=3, label=method.name)
        metric = method.best[0]["metric"]
    axes[0][0].set_xscale("log")
    finish_panel(axes[0][0], "Quality and size", "trainable parameters", metric)
    finish_panel(axes[0][1], "Quality and memory", "peak memory, MiB", metric)
    save_png(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--baseline", default="lora")
    parser.add_argument("--no-plots", action="store_true")
    parser.add_argument("--summary", help="a Markdown file for one table of all folders")
    arguments = parser.parse_args()
    for folder in arguments.folders:
        text = table(folder, arguments.baseline)
        replace_file(os.path.join(folder, "report.md"), text + "\n")
        print(text)
        if not arguments.no_plots:
            methods, _ = load_sweep(folder)
            plot_curves(methods, os.path.join(folder, "curves.png"))
            plot_quality(methods, os.path.join(folder, "quality.png"))
    if arguments.summary:
        replace_file(arguments.summary, summary(arguments.folders) + "\n")


if __name__ == "__main__":
    main()
