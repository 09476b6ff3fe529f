"""Judge by its loss whether a training run is unstable: spikes, divergence, and values that are not finite.

The Deep Learning Tuning Playbook calls a run unstable if its loss rises for periods, early (where warmup helps) or
later (where gradient clipping helps). Here a rise is measured against what the run has achieved and against its own
noise, so that no scale has to be set. `loss_limit` is the rule; `LossMonitor` applies it while losses arrive.
"""

from __future__ import annotations

import json
import math
import os
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median, median_low

from ..files.checkpoints import STATE_NAME, last_complete_checkpoint

UNSTABLE, STABLE, TOO_SHORT = "unstable", "stable", "too short to tell"
LEVEL_WINDOW, LEVEL_HELD_BY = 5, 4  # a level counts if four of the last five losses reach it
BEST_WINDOW = 20  # losses whose median is a level that the run has achieved
NOISE_WINDOW, RECENT_NOISE_WINDOW = 50, 20  # changes from loss to loss that the noise is measured on, and
LEAST_CHANGES = 9  # how many of them there have to be
LEAST_LOSSES = LEAST_CHANGES + 1  # fewer say nothing about stability
NOISE_FACTOR = 5.0  # a rise is this many robust standard deviations of the noise, and
PROGRESS_FACTOR = 0.05  # this share of what the loss has come down so far
SINGLE_LOSS_FACTOR = 4.0  # the level of a run is known this well from a single loss
CEILING_FACTOR = 1.25  # above this many times what the first losses leave open, no noise is an excuse
EARLY_SHARE, EARLY_STEPS = 0.1, 10  # of the run, or steps if that is more: before this, warmup is the remedy
_CHANGE_TO_SIGMA = 1.4826 / math.sqrt(2)  # median |difference of two| to the standard deviation of one, normal noise


def highest_level(middle: float, count: int) -> float:
    """Return the highest level that `count` losses with the median `middle` leave open.

    One loss leaves open four times its value, and the uncertainty falls with the square root of the count:
    middle · 4^(1/√count). For a negative median the distance grows alike: middle + |middle| (4^(1/√count) - 1).
    """
    return middle + abs(middle) * (SINGLE_LOSS_FACTOR ** (1 / math.sqrt(count)) - 1)


def loss_limit(best: float, count: int, start: float, calm: float, noise: float, ceiling: float) -> float:
    """Return the level above which a run is unstable, from what it has shown before it got there.

    A rise above the best level counts if it exceeds three things at once: five standard deviations of the run's
    calmest noise, 5% of its progress, and what so few losses leave open (`highest_level`). Noise can grow in a healthy
    run, as when a model begins to tell examples apart. So the noise of the latest losses is an excuse too, but only up
    to a ceiling that the first losses set. An explosion is noisy; with the ceiling it cannot excuse itself.

    Args:
        best: the lowest running median so far.
        count: how many losses there were so far.
        start: the lowest running median of the first five losses.
        calm: the smallest standard deviation of the noise so far, without the losses that are judged; 0 if unknown.
        noise: the standard deviation of the noise now, with the losses that are judged; inf if unknown.
        ceiling: the level that no noise excuses.
    """
    rise = max(NOISE_FACTOR * calm, PROGRESS_FACTOR * (start - best), highest_level(best, count) - best)
    return max(best + rise, min(best + NOISE_FACTOR * noise, ceiling))


@dataclass
class Event:
    """A period in which the loss was not what it should be.

    Attributes:
        kind: "spike" (it came back), "divergence" (it did not) or "non-finite".
        start, end: first and last step of it.
        height: largest loss in it over the best level before it; inf for "non-finite".
    """

    kind: str
    start: int
    end: int
    height: float


@dataclass
class InstabilityReport:
    """Events found in one run.

    Attributes:
        events: in order.
        steps: the last step.
        losses: how many losses were judged.
    """

    events: list[Event]
    steps: int
    losses: int

    @property
    def verdict(self) -> str:
        """Return "unstable", "stable", or "too short to tell" for fewer than ten losses without an event."""
        if self.events:
            return UNSTABLE
        return STABLE if self.losses >= LEAST_LOSSES else TOO_SHORT

    @property
    def unstable(self) -> bool:
        """Return True if there was an event."""
        return bool(self.events)

    @property
    def diverged(self) -> bool:
        """Return True if the loss was not finite, or had not come back when the run ended."""
        return any(event.kind != "spike" for event in self.events)

    @property
    def early(self) -> bool:
        """Return True if the first event starts within the first tenth of the run, or its first ten steps."""
        return self.unstable and self.events[0].start <= max(EARLY_STEPS, EARLY_SHARE * self.steps)

    @property
    def advice(self) -> str:
        """Name the playbook's first remedy."""
        if self.verdict == TOO_SHORT:
            return f"{self.losses} losses are too short to tell: log at least {LEAST_LOSSES} (logging_steps=1)."
        if self.verdict == STABLE:
            return "The loss shows no instability."
        if self.early:
            remedy = "Unstable early in training: learning-rate warmup comes first, then gradient clipping."
        else:
            remedy = "Unstable in the middle of training: gradient clipping comes first."
        return (
            remedy + " If that is not enough: another optimizer, normalised residual branches, a lower learning rate."
        )


class LossMonitor:
    """Find instability while losses arrive, in constant time and memory for each.

    The first loss is that of the model before any update, so the second step is the first that can go wrong. The level
    of the run is what four of its last five losses reach. An event begins where the level exceeds `loss_limit`, and
    ends where four of five losses are back below half of that rise. Losses within an event move no limit. A loss that
    is not finite is an event of its own.

    Attributes:
        events: what was found so far; an event that is still open is a divergence.
        limit: what the level of the last loss was held against; None before there are five losses.
    """

    def __init__(self):
        self.events: list[Event] = []
        self.limit: float | None = None
        self._recent: deque[tuple[int, float]] = deque(maxlen=BEST_WINDOW)
        self._changes: deque[float] = deque(maxlen=NOISE_WINDOW + LEVEL_WINDOW)
        self._first: list[float] = []
        self._count = 0  # finite losses outside of events
        self._taken = 0
        self._step = 0
        self._start = self._best = self._ceiling = self._calm = math.inf
        self._half = math.inf  # half of the rise at which the open event began
        self._open: Event | None = None

    def update(self, loss: float, step: int | None = None) -> Event | None:
        """Take the loss of the next step, and return the event that begins with it, if one does."""
        self._step = self._step + 1 if step is None else step
        self._taken += 1
        known = len(self.events)
        if math.isfinite(loss):
            self._take(loss)
        else:
            self._take_non_finite()
        return self.events[-1] if len(self.events) > known else None

    def report(self) -> InstabilityReport:
        """Return what was found so far."""
        return InstabilityReport([replace(event) for event in self.events], self._step, self._taken)

    def _take(self, loss: float) -> None:
        if self._open is not None and self._open.kind == "non-finite":
            self._open = None
        last = self._recent[-1][1] if self._recent else None
        self._recent.append((self._step, loss))
        if self._open is not None:
            self._continue(loss)
            return
        if last is not None:
            self._changes.append(abs(loss - last))
        self._judge(loss)

    def _judge(self, loss: float) -> None:
        losses = [x for _, x in self._recent]
        self._count += 1
        if self._count <= LEVEL_WINDOW:
            self._first.append(loss)
            highest = highest_level(median_low(self._first), self._count)
            self._ceiling = min(self._ceiling, highest + (CEILING_FACTOR - 1) * abs(highest))
        if len(losses) >= LEVEL_WINDOW:
            calm, noise = self._noise()
            self.limit = loss_limit(self._best, self._count, self._start, calm, noise, self._ceiling)
            if sorted(losses[-LEVEL_WINDOW:])[-LEVEL_HELD_BY] > self.limit:
                self._begin()
                return
        self._best = min(self._best, median(losses))
        if self._count <= LEVEL_WINDOW:
            self._start = self._best

    def _noise(self) -> tuple[float, float]:
        """Return the standard deviation of the calmest noise so far, and of the noise now."""
        changes = list(self._changes)
        earlier = _deviation(changes[:-LEVEL_WINDOW])
        now = _deviation(changes[-RECENT_NOISE_WINDOW:])
        if earlier is not None:
            self._calm = min(self._calm, earlier)
        calm = 0.0 if earlier is None else self._calm
        return calm, math.inf if now is None else max(now, earlier or 0.0)

    def _begin(self) -> None:
        self._half = (self._best + self.limit) / 2
        points = list(self._recent)
        first = len(points) - LEVEL_WINDOW
        while points[first][1] <= self._half:
            first += 1
        while first and points[first - 1][1] > self._half:
            first -= 1
        height = max(loss for _, loss in points[first:]) - self._best
        last = max(step for step, loss in points if loss > self._half)
        self._open = Event("divergence", points[first][0], last, height)
        self.events.append(self._open)

    def _continue(self, loss: float) -> None:
        if loss > self._half:
            self._open.end = self._step
            self._open.height = max(self._open.height, loss - self._best)
        losses = [x for _, x in self._recent]
        if sorted(losses[-LEVEL_WINDOW:])[LEVEL_HELD_BY - 1] <= self._half:
            self._open.kind = "spike"
            self._open = None

    def _take_non_finite(self) -> None:
        if self._open is None or self._open.kind != "non-finite":
            self._open = Event("non-finite", self._step, self._step, math.inf)
            self.events.append(self._open)
        self._open.end = self._step


def _deviation(changes: Sequence[float]) -> float | None:
    """Return the standard deviation of a loss whose changes from one to the next are given; None if too few are."""
    if len(changes) < LEAST_CHANGES:
        return None
    return _CHANGE_TO_SIGMA * median(changes)


def detect_instability(losses: Sequence[float] | str | os.PathLike) -> InstabilityReport:
    """Find spikes, divergence and values that are not finite in the losses of a run.

    Args:
        losses: the training losses in order, best of every step; or a trainer_state.json, or a folder that holds one
            (or checkpoints that do). Averages over `logging_steps` steps hide what is shorter than that.

    Returns:
        The report. Its verdict is "unstable", "stable" or "too short to tell".

    Raises:
        FileNotFoundError, ValueError: no losses there.
    """
    if isinstance(losses, (str, os.PathLike)):
        steps, losses = read_losses(losses)
    else:
        steps = range(1, len(losses) + 1)
    if not len(losses):
        raise ValueError("losses is empty: give the training loss of at least one step.")
    monitor = LossMonitor()
    for step, loss in zip(steps, losses):
        monitor.update(float(loss), step)
    return monitor.report()


def read_losses(path: str | os.PathLike) -> tuple[list[int], list[float]]:
    """Return steps and training losses from a trainer_state.json, or from the newest one in a folder of checkpoints."""
    path = os.fspath(path)
    if os.path.isdir(path):
        path = _newest_state(path)
    with open(path, encoding="utf-8") as file:
        log = json.load(file).get("log_history", [])
    points = [(entry["step"], entry["loss"]) for entry in log if "loss" in entry]
    if not points:
        raise ValueError(f"{path!r} holds no training loss: was logging_strategy='no'?")
    steps, losses = zip(*points)
    return list(steps), list(losses)


def _newest_state(folder: str) -> str:
    for candidate in (folder, last_complete_checkpoint(folder)):
        path = candidate and os.path.join(candidate, STATE_NAME)
        if path and os.path.exists(path):
            return path
    raise FileNotFoundError(f"{folder!r} has no trainer_state.json, nor a complete checkpoint.")
