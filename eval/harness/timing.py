"""Seconds of calls, and of one kind of step over another's."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

from .statistics import with_range


def synchronize(device: str) -> None:
    """Wait until the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def timed(device: str, call: Callable[[], None]) -> float:
    """Return the seconds of a call, with all that it has given to the device.

    On a CPU these are seconds of all its threads: what else the machine does counts less than on the clock.
    """
    clock = time.perf_counter if device == "cuda" else time.process_time
    synchronize(device)
    started = clock()
    call()
    synchronize(device)
    return clock() - started


def with_interval(without: list[float], rescaling: list[float], interval: float) -> list[float]:
    """Return the mean time of a step where one step in `interval` rescales."""
    return [a + (b - a) / interval for a, b in zip(without, rescaling)]


def ratios(seconds: Sequence[float], others: Sequence[float]) -> dict[str, float]:
    """Return median and quartiles of `seconds` over those of the others, pair by pair."""
    return spread([a / b for a, b in zip(seconds, others)])


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median and quartiles."""
    low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
    return {"median": statistics.median(values), "low": low, "high": high}


def quartiles(found: dict[str, float]) -> str:
    """Return what `ratios` has found as "median (low to high)"."""
    return with_range(found["median"], found["low"], found["high"], ".2f")
