"""Search for a learning-rate warmup as the playbook does: the remedy for a training that is unstable early."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from transformers import Trainer
from transformers.trainer_utils import SchedulerType

from ..files.atomic import replace_file
from ..plots import require_matplotlib
from .instability import STABLE, UNSTABLE, detect_instability
from .learning_rate import NO_UNSTABLE_RUN
from .runs import Run, finish
from .study import Point, Study, sqlite_storage

logger = logging.getLogger(__name__)
PEAKS = (10, 100)  # peak learning rates, in unstable base learning rates
POST_WARMUP = 2  # constant steps after the ramp, in warmup steps
LONGEST_WARMUP = 0.1  # of the training steps
NO_STABLE_WARMUP = "No warmup was stable: clip gradients, or lower the learning rate."
TRAIN_LONGER = 0.05  # of the training steps: a longer warmup wants a longer training


@dataclass
class WarmupRun:
    """Hold one warmup that was tried.

    Attributes:
        warmup_steps, learning_rate: length of the ramp, and the learning rate it ends at.
        verdict: what `detect_instability` says of it.
        losses: of ramp and constant part.
    """

    warmup_steps: int
    learning_rate: float
    verdict: str
    losses: list[float]

    @property
    def unstable(self) -> bool:
        """Return True if training was unstable with it."""
        return self.verdict == UNSTABLE


@dataclass
class WarmupResult:
    """Hold all warmups tried for a training of `max_steps` steps.

    Attributes:
        warmup_steps, learning_rate: the shortest stable warmup, and the highest peak learning rate it is stable with;
            None if none is.
    """

    runs: list[WarmupRun]
    max_steps: int
    warmup_steps: int | None
    learning_rate: float | None

    @property
    def total_steps(self) -> int:
        """Return the length of the training with the warmup before its schedule."""
        return self.max_steps + (self.warmup_steps or 0)

    @property
    def advice(self) -> str:
        """Say what warmup to train with."""
        if self.warmup_steps is None:
            return NO_STABLE_WARMUP
        text = f"{self.warmup_steps} steps of warmup to {self.learning_rate:g}, then the schedule as it is: "
        text += f"{self.max_steps} + {self.warmup_steps} = {self.total_steps} steps."
        if self.warmup_steps > TRAIN_LONGER * self.max_steps:
            text += " That is more than 5% of the training: train longer."
        return text


def warmup_grid(max_steps: int) -> list[int]:
    """Return 10, 100, 1000, ... up to 10% of the training steps.

    Raises:
        ValueError: 10 steps are more than 10% already.
    """
    grid = []
    while 10 ** (len(grid) + 1) <= LONGEST_WARMUP * max_steps:
        grid.append(10 ** (len(grid) + 1))
    if not grid:
        raise ValueError(f"max_steps={max_steps} is too short: 10 steps of warmup are more than 10% of it.")
    return grid


def search_warmup(
    train: Callable[[float, int, int], Trainer | Sequence[float]],
    unstable_base_learning_rate: float | None,
    max_steps: int,
    output: str | os.PathLike,
    storage: str | None = None,
    settings: dict | None = None,
    plot: bool = True,
) -> WarmupResult:
    """Find the shortest warmup with which training is stable far above the learning rate where it blows up without.

    Ramps from 0 to 10 and to 100 times the unstable base learning rate over 10, 100, 1000, ... steps (at most 10% of
    `max_steps`), and holds it for twice as many. Resumes and is shared as `sweep_learning_rate` is; warmup.json and
    warmup.png are written to `output`. `prepend_warmup` puts the result before a schedule.

    Args:
        train: takes peak learning rate, warmup steps and all steps of a run (three times the warmup). Returns a Trainer
            with that learning rate (its schedule and length are set here), or trains by itself, ramp and constant
            part, and returns the loss of every step.
        unstable_base_learning_rate: from `sweep_learning_rate`; None, where it found none, is refused.
        max_steps: length of the training that the warmup is for, without it.
        output, storage, settings: as for `sweep_learning_rate`.

    Raises:
        ImportError: names the extra. RuntimeError: started by torchrun with several ranks.
        ValueError: there is no unstable learning rate, max_steps is too short, or the storage is of another search.
    """
    if unstable_base_learning_rate is None:
        raise ValueError(f"unstable_base_learning_rate=None, nothing to warm up to. {NO_UNSTABLE_RUN}")
    grid = warmup_grid(max_steps)
    if plot:
        require_matplotlib()
    study = Study(storage or sqlite_storage(output), "warmup", settings)

    def run(point: Point) -> Run:
        steps = (1 + POST_WARMUP) * point.warmup_steps
        result = train(point.learning_rate, point.warmup_steps, steps)
        return finish(
            result,
            point.learning_rate,
            max_steps=steps,
            warmup_steps=point.warmup_steps,
            lr_scheduler_type=SchedulerType.CONSTANT_WITH_WARMUP,
        )

    peaks = [peak * unstable_base_learning_rate for peak in PEAKS]
    points = [Point("warmup", rate, steps) for steps in grid for rate in peaks]
    results = study.run(points, run, "warmups")
    warmup = summarize_warmup({point: results[point] for point in points}, max_steps)
    os.makedirs(output, exist_ok=True)
    replace_file(os.path.join(output, "warmup.json"), json.dumps(asdict(warmup) | {"advice": warmup.advice}, indent=1))
    if plot:
        from .plots import plot_warmup

        plot_warmup(os.path.join(output, "warmup.png"), warmup)
    logger.info(f"{warmup.advice} Runs and plot are in {os.fspath(output)}.")
    return warmup


def summarize_warmup(runs: dict[Point, Run], max_steps: int) -> WarmupResult:
    """Find the shortest stable warmup among finished runs, and the highest peak that is stable with it."""
    tried = [
        WarmupRun(p.warmup_steps, p.learning_rate, detect_instability(run.losses).verdict, run.losses)
        for p, run in sorted(runs.items(), key=lambda item: (item[0].warmup_steps, item[0].learning_rate))
    ]
    stable = [run for run in tried if run.verdict == STABLE]
    shortest = min((run.warmup_steps for run in stable), default=None)
    rate = max((run.learning_rate for run in stable if run.warmup_steps == shortest), default=None)
    return WarmupResult(tried, max_steps, shortest, rate)


def prepend_warmup(schedule: Callable[[int], float], warmup_steps: int | None) -> Callable[[int], float]:
    """Put a ramp from 0 to the schedule's first value over `warmup_steps` before a schedule, for torch's LambdaLR.

    Raises:
        ValueError: warmup_steps is None, as `search_warmup` found no stable warmup.
    """
    if warmup_steps is None:
        raise ValueError(f"warmup_steps=None, there is no ramp to prepend. {NO_STABLE_WARMUP}")

    def factor(step: int) -> float:
        if step < warmup_steps:
            return step / warmup_steps * schedule(0)
        return schedule(step - warmup_steps)

    return factor
