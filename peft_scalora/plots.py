"""Draw line plots of a run. Needs the extra `plots` (matplotlib)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from .files.atomic import replacing
from .version import install_command

Series = Mapping[str, tuple[Sequence[float], Sequence[float]]]  # label -> (x, y)


def require_matplotlib():
    """Return matplotlib.pyplot, imported on a backend that needs no display.

    Raises:
        ImportError: names the extra that brings it.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(f"Plots need matplotlib: {install_command('plots')}, or switch plots off.") from error
    matplotlib.use("Agg", force=False)
    from matplotlib import pyplot

    return pyplot


def panels(count: int):
    """Make a figure with `count` panels side by side."""
    return require_matplotlib().subplots(1, count, figsize=(5.2 * count, 3.6), squeeze=False)


def finish_panel(axis, title: str, x_label: str, y_label: str, legend: bool = True) -> None:
    """Add title, labels, grid, and the legend below the panel, never over a curve."""
    axis.set(title=title, xlabel=x_label, ylabel=y_label)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    labels = axis.get_legend_handles_labels()[1]
    if legend and labels:
        longest = max(map(len, labels))
        columns = min(4, max(1, 48 // (longest + 8)))  # as many as a panel is wide
        axis.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncol=columns)


def save_png(figure, path: str | os.PathLike) -> None:
    """Write the figure atomically, and close it."""
    figure.tight_layout()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)
    require_matplotlib().close(figure)


def plot_lines(path: str | os.PathLike, lines: Sequence[tuple[str, str, Series]]) -> None:
    """Write a PNG with one panel for each (title, y label, series), all over the optimizer step."""
    figure, axes = panels(len(lines))
    for axis, (title, label, series) in zip(axes[0], lines):
        for name, (x, y) in series.items():
            axis.plot(x, y, label=name, linewidth=1.6, marker="o" if len(x) < 3 else None)
        finish_panel(axis, title, "optimizer step", label, legend=len(series) > 1)
    save_png(figure, path)
