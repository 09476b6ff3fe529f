"""Line plots of a run. Needs the extra `plots` (matplotlib)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from .files import replacing

Series = Mapping[str, tuple[Sequence[float], Sequence[float]]]  # label -> (x, y)


def require_matplotlib():
    """matplotlib.pyplot on a backend without a display.

    Raises:
        ImportError: names the extra that brings it.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("Plots need matplotlib: pip install 'peft-scalora[plots]', or switch plots off.") from error
    matplotlib.use("Agg", force=False)
    from matplotlib import pyplot

    return pyplot


def plot_lines(path: str | os.PathLike, panels: Sequence[tuple[str, str, Series]]) -> None:
    """Write a PNG with one panel for each (title, y label, series), all over the optimizer step."""
    pyplot = require_matplotlib()
    figure, axes = pyplot.subplots(1, len(panels), figsize=(5.2 * len(panels), 3.6), squeeze=False)
    for axis, (title, label, series) in zip(axes[0], panels):
        for name, (x, y) in series.items():
            axis.plot(x, y, label=name, linewidth=1.6, marker="o" if len(x) < 3 else None)
        axis.set(title=title, xlabel="optimizer step", ylabel=label)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        if len(series) > 1:
            below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.2), "ncol": 4}  # never over a curve
            axis.legend(frameon=False, **below)
    figure.tight_layout()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)
    pyplot.close(figure)
