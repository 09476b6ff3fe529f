"""Sweep the learning rate as the playbook does: where it is best, and where training blows up."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

from transformers import Trainer

from ..files.atomic import replace_file
from ..plots import require_matplotlib
from .instability import LEAST_LOSSES, STABLE, TOO_SHORT, UNSTABLE, InstabilityReport, detect_instability
from .runs import Run, finish, finish_evaluating
from .study import Point, Study, sqlite_storage

logger = logging.getLogger(__name__)
NO_UNSTABLE_RUN = "No run was unstable: raise `high` to learn where training blows up."


@dataclass
class SweepResult:
    """Hold every learning rate tried, in ascending order, and what follows from them.

    Attributes:
        learning_rates, scores: lower scores are better; inf for a run whose loss was not finite.
        verdicts: what `detect_instability` says of each run: "stable", "unstable" or "too short to tell".
        losses: training losses of every step of each run.
        best_learning_rate: lr*, that of the lowest score.
        unstable_base_learning_rate: the lowest above lr* whose run is unstable; None if none is.
        check_losses: of the short run at twice lr*, evaluated at every step; empty without one.
    """

    learning_rates: list[float]
    scores: list[float]
    verdicts: list[str]
    losses: list[list[float]]
    best_learning_rate: float
    unstable_base_learning_rate: float | None
    check_losses: list[float] = field(default_factory=list)

    @property
    def unstable(self) -> list[bool]:
        """Return, for each run, whether it was unstable."""
        return [verdict == UNSTABLE for verdict in self.verdicts]

    @property
    def check(self) -> InstabilityReport | None:
        """Judge the short run at twice lr*: the playbook's quick test for an unstable workload."""
        return detect_instability(self.check_losses) if self.check_losses else None

    @property
    def advice(self) -> str:
        """Say what follows from the runs, and what to do next."""
        best, blown = self.best_learning_rate, self.unstable_base_learning_rate
        if best in (self.learning_rates[0], self.learning_rates[-1]):
            return f"The best learning rate, {best:g}, is at the edge: widen the range."
        if self.check is not None and self.check.verdict != STABLE:
            warmup = f" Search the warmup from unstable_base_learning_rate={blown:g}." if blown else ""
            return f"At twice the best learning rate: {self.check.advice}{warmup}"
        if blown is None and TOO_SHORT in self.verdicts:
            return f"Runs of fewer than {LEAST_LOSSES} steps are too short to tell where training blows up."
        if blown is None:
            return NO_UNSTABLE_RUN
        if self.check is None:
            return f"Training blows up from {blown:g} on: train at {best:g}."
        return f"Stable at twice the best learning rate, so instability does not limit this model: train at {best:g}."


def learning_rate_grid(low: float, high: float, per_decade: int) -> list[float]:
    """Return the powers 10^(k / per_decade) within [low, high]; a multiple of per_decade gives these and more.

    Raises:
        ValueError: there are fewer than two.
    """
    if not 0 < low < high:
        raise ValueError(f"low={low!r} and high={high!r} must be positive, the first below the second.")
    first, last = (math.log10(rate) * per_decade for rate in (low, high))
    grid = [10 ** (k / per_decade) for k in range(math.ceil(first - 1e-9), math.floor(last + 1e-9) + 1)]
    if len(grid) < 2:
        raise ValueError(
            f"low={low:g}, high={high:g}, per_decade={per_decade} give {len(grid)} points: widen the range."
        )
    return grid


def sweep_learning_rate(
    train: Callable[[float], Trainer | Sequence[float]],
    low: float = 1e-6,
    high: float = 1.0,
    per_decade: int = 2,
    *,
    output: str | os.PathLike,
    storage: str | None = None,
    check_steps: int = 500,
    check_rows: int = 64,
    settings: dict | None = None,
    plot: bool = True,
) -> SweepResult:
    """Train at log-spaced learning rates; find lr*, where training blows up, and whether that limits the model.

    Ends with the playbook's quick check, a short run at twice lr* that is evaluated at every step. Finished runs are
    kept: a sweep that was killed continues, and several processes given the same storage share the work. sweep.json
    and sweep.png are written to `output`.

    Args:
        train: takes a learning rate and returns a Trainer with it (trained here, of a new model each time; its score is
            the loss on its eval_dataset, if it has one), or trains by itself and returns the loss of every step. All
            random generators are seeded alike before each call.
        low, high, per_decade: the grid, see `learning_rate_grid`.
        output: folder of this sweep alone: runs that are found there are taken for its own.
        storage: optuna database URL; the file study.db in `output` if not given.
        check_steps: length of the short run of a Trainer; 0 leaves it out.
        check_rows: how many rows of the evaluation data it is evaluated on.
        settings: what all runs have in common, to refuse the storage of another sweep.

    Raises:
        ImportError: names the extra. RuntimeError: started by torchrun with several ranks.
        ValueError: the range is empty, or the storage belongs to another sweep.
    """
    grid = learning_rate_grid(low, high, per_decade)
    if plot:
        require_matplotlib()
    study = Study(storage or sqlite_storage(output), "learning_rate", settings)

    def run(point: Point) -> Run:
        result = train(point.learning_rate)
        if point.kind == "check":
            return finish_evaluating(result, point.learning_rate, point.check_steps, point.check_rows)
        return finish(result, point.learning_rate)

    results = study.run([Point("sweep", rate) for rate in grid], run, "learning rates")
    sweep = summarize_sweep({p.learning_rate: r for p, r in results.items() if p.kind == "sweep"})
    if check_steps:
        check = Point("check", 2 * sweep.best_learning_rate, check_steps=check_steps, check_rows=check_rows)
        sweep.check_losses = study.run([check], run, "check at twice the best")[check].losses
    os.makedirs(output, exist_ok=True)
    replace_file(os.path.join(output, "sweep.json"), json.dumps(asdict(sweep) | {"advice": sweep.advice}, indent=1))
    if plot:
        from .plots import plot_sweep

        plot_sweep(os.path.join(output, "sweep.png"), sweep)
    logger.info(f"{sweep.advice} Runs and plot are in {os.fspath(output)}.")
    return sweep


def summarize_sweep(runs: dict[float, Run]) -> SweepResult:
    """Find lr* and the unstable base learning rate among finished runs, given by learning rate.

    Raises:
        ValueError: no run has a finite score.
    """
    rates = sorted(runs)
    scores = [runs[rate].score for rate in rates]
    if not any(map(math.isfinite, scores)):
        raise ValueError(f"no run from {rates[0]:g} to {rates[-1]:g} has a finite loss: lower the range.")
    best = rates[scores.index(min(scores))]
    verdicts = [detect_instability(runs[rate].losses).verdict for rate in rates]
    blown = next((rate for rate, verdict in zip(rates, verdicts) if verdict == UNSTABLE and rate > best), None)
    return SweepResult(rates, scores, verdicts, [runs[rate].losses for rate in rates], best, blown)
