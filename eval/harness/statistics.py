"""Means over seeds with their errors, and differences between two methods on the same seeds and the same rows."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

import numpy as np
from scipy.stats import bootstrap, ttest_rel


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and its standard error; None for the error of a single value."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return statistics.fmean(values), error


def running(function: Callable[[Sequence[float]], float], values: Sequence[float], width: int = 10) -> list[float]:
    """Return `function` of every value together with the `width` - 1 before it, or as many as there are."""
    return [function(values[max(0, end - width) : end]) for end in range(1, len(values) + 1)]


def with_range(middle: float, low: float, high: float, form: str) -> str:
    """Return "middle (low to high)", or the middle alone where all are equal."""
    return f"{middle:{form}}" if low == high else f"{middle:{form}} ({low:{form}} to {high:{form}})"


def median_and_range(values: Sequence[float], form: str) -> str:
    """Return the median with the lowest and the highest value."""
    return with_range(statistics.median(values), min(values), max(values), form)


def paired_seeds(first: Sequence[float], second: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean of second - first over the same seeds, and the paired t-test's p (None below two seeds)."""
    difference = statistics.fmean(b - a for a, b in zip(first, second, strict=True))
    if len(first) < 2 or len({b - a for a, b in zip(first, second)}) == 1:
        return difference, None
    return difference, float(ttest_rel(second, first).pvalue)


def paired_rows(
    first: np.ndarray, second: np.ndarray, metric: Callable[[np.ndarray, np.ndarray], float], resamples: int = 500
) -> tuple[float, float]:
    """Return the 95% percentile interval of the metric's difference, second - first, when rows are drawn anew.

    Args:
        first, second: predictions, seeds x rows, of the same seeds and rows.
        metric: (predictions of one seed, numbers of their rows) -> value; its mean over seeds is compared.
    """
    found = bootstrap(
        (np.arange(first.shape[1]),),
        lambda rows: float(np.mean([metric(b[rows], rows) - metric(a[rows], rows) for a, b in zip(first, second)])),
        vectorized=False,
        n_resamples=resamples,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)
