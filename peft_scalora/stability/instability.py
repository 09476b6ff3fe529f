"""When a training run is unstable: spikes, divergence and non-finite values in its loss.

The Deep Learning Tuning Playbook calls a run unstable if its loss rises for periods, early (where warmup helps) or
later (where gradient clipping helps). Here "rises" is measured against the run's own noise, so that no scale has to
be set.
"""

from __future__ import annotations

import json
import math
import os
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from statistics import median

from ..files.checkpoints import STATE_NAME, last_complete_checkpoint

LEVEL_WINDOW = 5  # losses whose median is the current level: a rise has to hold for three of them
BEST_WINDOW = 20  # losses whose median counts as a level the run has reached
NOISE_WINDOW = 50  # changes from loss to loss that the noise is measured on, and
LEAST_CHANGES = 9  # how many there have to be
NOISE_FACTOR = 6.0  # a rise is this many robust standard deviations, and
PROGRESS_FACTOR = 0.1  # this share of what the loss has come down so far, or
START_FACTOR = 2.0  # this many times the largest of the first losses, however noisy the run has become
EARLY_SHARE, EARLY_STEPS = 0.1, 10  # of the run, or steps if that is more: before this, warmup is the remedy
_CHANGE_TO_SIGMA = 1.4826 / math.sqrt(2)  # median |difference of two| to the standard deviation of one, normal noise
_LEAST_NOISE = 0.01  # relative to the best level


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
    """What was found in one run of `steps` steps."""

    events: list[Event]
    steps: int

    @property
    def unstable(self) -> bool:
        return bool(self.events)

    @property
    def diverged(self) -> bool:
        """The loss was not finite, or had not come back when the run ended."""
        return any(event.kind != "spike" for event in self.events)

    @property
    def early(self) -> bool:
        """The first event starts within the first tenth of the run, or its first ten steps."""
        return self.unstable and self.events[0].start <= max(EARLY_STEPS, EARLY_SHARE * self.steps)

    @property
    def advice(self) -> str:
        """What the playbook tries first."""
        if not self.unstable:
            return "The loss shows no instability."
        if self.early:
            remedy = "Unstable early in training: learning-rate warmup comes first, then gradient clipping."
        else:
            remedy = "Unstable in the middle of training: gradient clipping comes first."
        return (
            remedy + " If that is not enough: another optimizer, normalised residual branches, a lower learning rate."
        )


class LossMonitor:
    """Finds instability while losses arrive, in constant time and memory for each.

    The level of a run is the median of its last 5 losses, its best level the smallest median of 20 seen so far, and its
    noise the median change from one loss to the next over the last 50. An event begins where the level exceeds the
    best level by 6 standard deviations of the noise and by a tenth of the run's progress so far, or by twice the
    largest of the first 5 losses, and ends where half of that is left. A loss that is not finite is an event of its
    own. The first 50 losses have one noise, and are judged anew with each of them: noise may be small before a model
    has learned anything, or large as it blows up.
    """

    def __init__(self):
        self._changes: deque[float] = deque(maxlen=NOISE_WINDOW)
        self._start: list[tuple[int, float]] = []
        self._last: float | None = None
        self._step = 0
        self._track = _Track(self._changes)

    @property
    def events(self) -> list[Event]:
        """What was found so far; an event that is still open is a divergence."""
        return self._track.events

    def update(self, loss: float, step: int | None = None) -> Event | None:
        """Take the loss of the next step; returns the event that begins with it, if one does."""
        self._step = self._step + 1 if step is None else step
        known = len(self.events)
        change = abs(loss - self._last) if self._last is not None and math.isfinite(loss) else None
        self._last = loss if math.isfinite(loss) else self._last
        if len(self._start) <= NOISE_WINDOW:
            self._start.append((self._step, loss))
            if change is not None:
                self._changes.append(change)
            self._track = _Track(self._changes)
            for point in self._start:
                self._track.add(*point)
        else:
            inside = self._track.add(self._step, loss)
            if change is not None and not inside:
                self._changes.append(change)
        return self.events[-1] if len(self.events) > known else None

    def report(self) -> InstabilityReport:
        """What was found so far."""
        return InstabilityReport([Event(**vars(event)) for event in self.events], self._step)


class _Track:
    """Level, best level and events of a run, measured against given changes from loss to loss."""

    def __init__(self, changes: deque[float]):
        self.events: list[Event] = []
        self._changes = changes
        self._recent: deque[tuple[int, float]] = deque(maxlen=BEST_WINDOW)
        self._first: float | None = None
        self._begun: list[float] = []  # the first losses
        self._best = self._threshold = math.inf
        self._open: Event | None = None

    def add(self, step: int, loss: float) -> bool:
        """Take one loss; whether it is part of an event."""
        if not math.isfinite(loss):
            return self._add_non_finite(step)
        if self._open is not None and self._open.kind == "non-finite":
            self._open = None
        self._recent.append((step, loss))
        losses = [x for _, x in self._recent]
        if len(self._begun) < LEVEL_WINDOW:
            self._begun.append(abs(loss))
        level = median(losses[-LEVEL_WINDOW:])
        if self._first is None:
            self._first = self._best = level
        if self._open is not None:
            return self._continue(step, loss, level)
        known = len(losses) >= LEVEL_WINDOW and len(self._changes) >= LEAST_CHANGES
        if known and level - self._best > (rise := self._rise()):
            return self._begin(self._best + rise / 2)
        self._best = min(self._best, median(losses))
        return False

    def _rise(self) -> float:
        noise = max(_CHANGE_TO_SIGMA * median(self._changes), _LEAST_NOISE * abs(self._best))
        rise = max(NOISE_FACTOR * noise, PROGRESS_FACTOR * (self._first - self._best))
        return min(rise, START_FACTOR * max(self._begun)) if any(self._begun) else rise

    def _begin(self, threshold: float) -> bool:
        above = list(takewhile(lambda point: point[1] > threshold, reversed(self._recent))) or [self._recent[-1]]
        self._threshold = threshold
        height = max(loss for _, loss in self._recent) - self._best
        self._open = Event("divergence", above[-1][0], above[0][0], height)
        self.events.append(self._open)
        return True

    def _continue(self, step: int, loss: float, level: float) -> bool:
        if level <= self._threshold:
            self._open.kind, self._open = "spike", None
            return False
        self._open.end = step
        self._open.height = max(self._open.height, loss - self._best)
        return True

    def _add_non_finite(self, step: int) -> bool:
        if self._open is None or self._open.kind != "non-finite":
            self._open = Event("non-finite", step, step, math.inf)
            self.events.append(self._open)
        self._open.end = step
        return True


def detect_instability(losses: Sequence[float] | str | os.PathLike) -> InstabilityReport:
    """Spikes, divergence and non-finite values in the losses of a run.

    Args:
        losses: the training losses in order, best of every step; or a trainer_state.json, or a folder that holds one
            (or checkpoints that do). Averages over `logging_steps` steps hide what is shorter than that.

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
    """Steps and training losses out of a trainer_state.json, or of the newest one in a folder of checkpoints."""
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
