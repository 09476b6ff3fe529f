"""The table and the plot of all results in a folder."""

from __future__ import annotations

import glob
import math
import os
import statistics
from collections import defaultdict
from collections.abc import Sequence

from eval.harness.record import FINISHED, read
from eval.harness.statistics import mean_and_error
from peft_scalora.files.atomic import replace_file
from peft_scalora.files.tables import markdown
from peft_scalora.plots import finish_panel, require_matplotlib, save_png

COLUMNS = (
    "seeds",
    "parameters, M",
    "non-zeros, M",
    "MB on disk",
    "memory, MB",
    "latency",
    "throughput",
    "seconds",
    "reload",
)
MEDIANS = ("parameters", "nonzeros", "bytes", "memory_bytes", "latency_ratio", "throughput_ratio", "seconds")


def write_report(folder: str, order: Sequence[str]) -> None:
    """Write methods.md and methods.png from the results in `folder`, rows in `order`."""
    results = read_all(folder)
    rows = summaries(results, order)
    if not rows:
        return
    replace_file(os.path.join(folder, "methods.md"), page(results, rows))
    measured = [row for row in rows if "quality" in row]
    if measured:
        plot(os.path.join(folder, "methods.png"), measured)


def summaries(results: dict[str, list[dict]], order: Sequence[str]) -> list[dict]:
    """Return the figures of every row, in `order`."""
    return [summary(name, results[name]) for name in order if name in results]


def page(results: dict[str, list[dict]], rows: Sequence[dict]) -> str:
    """Return the caption and the table."""
    return f"{caption(results)}\n\n{table(rows)}"


def read_all(folder: str) -> dict[str, list[dict]]:
    """Return the results by row."""
    found = defaultdict(list)
    for path in sorted(glob.glob(os.path.join(folder, "*-seed*.json"))):
        result = read(path)
        found[result["settings"]["row"]].append(result)
    return found


def caption(results: dict[str, list[dict]]) -> str:
    """Return what all rows have in common, as a sentence."""
    result = next((one for runs in results.values() for one in runs if "data" in one), None)
    if result is None:
        return "No row could be built."
    settings, tests = result["settings"], result["data"]["test"]
    rows = sum(part["rows"] for part in (tests if isinstance(tests, list) else [tests]))
    return (
        f"{settings['model']} on {result['task'].removeprefix('methods/')}, {rows} test rows. Whatever trains does so "
        f"for {settings['steps']} steps of {settings['batch_size']} rows (at most {settings['max_length']} tokens), "
        f"all weights at {settings['full_learning_rate']:g}, adapters of rank {settings['r']} at "
        f"{settings['learning_rate']:g}; {result['environment']['threads']} CPU thread(s)."
    )


def summary(name: str, results: Sequence[dict]) -> dict:
    """Return the figures of the seeds that have any, and the reasons of those that have none."""
    reasons = {result["settings"]["seed"]: reason for result in results if (reason := why_none(result))}
    done = [result for result in results if not why_none(result)]
    about = {name: results[0].get(name) for name in ("method", "caveat")} | {"row": name, "reasons": reasons}
    if not done:
        return about
    means = {metric: mean_and_error([result["metrics"][metric] for result in done]) for metric in done[0]["metrics"]}
    quality, error = means.pop(done[0]["metric"])
    figures = {
        "metric": done[0]["metric"],
        "quality": quality,
        "error": error,
        "others": {metric: mean for metric, (mean, _) in means.items()},
        "seeds": f"{len(done)} of {len(results)}" if reasons else str(len(done)),
        "reload": "equal" if all(result["reload"] == "equal" for result in done) else "differs",
    }
    return about | figures | {key: statistics.median(result[key] for result in done) for key in MEDIANS}


def why_none(result: dict) -> str | None:
    """Return why a run has no figures, in a line; None where it has."""
    reason = result.get("unfit") if result["status"] == FINISHED else result["error"]
    return reason and reason.partition("\n")[0]


def table(rows: Sequence[dict]) -> str:
    measured = [row for row in rows if "quality" in row]
    metrics = [measured[0]["metric"], *measured[0]["others"]] if measured else ["quality"]
    header = ["row", *(name.replace("_", "-") for name in metrics), *COLUMNS, "caveat"]
    return markdown(header, [_cells(row, len(header)) for row in rows]) + "\n"


def _cells(row: dict, columns: int) -> list[str]:
    if "quality" not in row:
        return [row["row"], next(iter(row["reasons"].values())), *[""] * (columns - 3), row["caveat"]]
    reasons = [f"seed {seed}: {reason}" for seed, reason in row["reasons"].items()]
    return [row["row"], *_figures(row), "; ".join([row["caveat"], *reasons])]


def _figures(row: dict) -> list[str]:
    error = f" ± {row['error']:.3f}" if row["error"] is not None else ""
    return [
        f"{row['quality']:.3f}{error}",
        *(f"{value:.3f}" for value in row["others"].values()),
        row["seeds"],
        f"{row['parameters'] / 1e6:.1f}",
        f"{row['nonzeros'] / 1e6:.1f}",
        f"{row['bytes'] / 1e6:.1f}",
        f"{row['memory_bytes'] / 1e6:.0f}",
        f"{row['latency_ratio']:.2f}",
        f"{row['throughput_ratio']:.2f}",
        f"{row['seconds']:.0f}",
        row["reload"],
    ]


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of the points (size, quality) that no other beats, by size."""
    front, best = [], -math.inf
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if points[i][1] > best:
            front.append(i)
            best = points[i][1]
    return front


def plot(path: str, rows: Sequence[dict]) -> None:
    """Plot quality against size, a colour a method, the Pareto front joined and named."""
    figure, axis = require_matplotlib().subplots(figsize=(9.5, 4.6))
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        axis.errorbar(
            [row["bytes"] / 1e6 for row in own],
            [row["quality"] for row in own],
            yerr=[row["error"] or 0 for row in own],
            fmt="o",
            label=method,
            alpha=0.8,
        )
    front = [rows[i] for i in pareto_front([(row["bytes"], row["quality"]) for row in rows])]
    sizes, qualities = [row["bytes"] / 1e6 for row in front], [row["quality"] for row in front]
    axis.plot(sizes, qualities, "k--", drawstyle="steps-post", lw=1, zorder=0, label="Pareto front")
    axis.plot(sizes, qualities, "ko", fillstyle="none", ms=11)
    for number, (row, *point) in enumerate(zip(front, sizes, qualities), 1):
        axis.annotate(str(number), point, (-9, 8), textcoords="offset points", fontsize=8, ha="center")
        axis.plot([], [], " ", label=f"{number}: {row['row']}")
    axis.set_xlim(left=0)
    axis.margins(y=0.1)
    finish_panel(axis, "Quality against size", "MB on disk", rows[0]["metric"].replace("_", "-"), legend=False)
    axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1.02), fontsize=9)
    save_png(figure, path)
