"""Share the runs of a search between processes, as trials of an optuna study. Needs the extra `hpo` (optuna).

The queue is built on optuna's trials and not on its GridSampler. To that, a trial that failed is done, and a finer
grid is another grid; here a run that failed is repeated, and a finer grid adds to what has finished.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta

from tqdm import tqdm
from transformers import set_seed
from transformers.utils import logging as transformers_logging

from ..version import install_command
from .instability import detect_instability
from .runs import Run

SEED = 0  # of every run: scores are not to depend on the order of the points, which is random
KINDS = ("sweep", "check", "warmup")
ATTEMPTS = 5  # to open a storage, as processes that start together get in each other's way creating its tables
HEARTBEAT, GRACE = 5, 30  # seconds: between signs of life, and without one until a run counts as dead
_RATE_RANGE, _STEP_RANGE = (1e-15, 1e6), (0, 10**9)  # wide: optuna has to accept whatever is enqueued


@dataclass(frozen=True)
class Point:
    """Name what one run of a search is given."""

    kind: str
    learning_rate: float
    warmup_steps: int = 0
    check_steps: int = 0
    check_rows: int = 0

    def __str__(self) -> str:
        warmup = f", {self.warmup_steps} steps of warmup" if self.warmup_steps else ""
        return f"learning rate {self.learning_rate:.3g}{warmup}"


class Study:
    """Keep the finished runs of a search in an optuna study, which several processes fill together.

    A point is run by one process; one whose process was killed is run again, as are those whose run raised an error.

    Args:
        storage: an optuna database URL, such as sqlite:///study.db.
        name: of the study in it.
        settings: what all its runs have in common; a study with others is refused.

    Raises:
        ImportError: names the extra. RuntimeError: this process is a rank of a distributed training.
        ValueError: the study was made with other settings.
    """

    def __init__(self, storage: str, name: str, settings: dict | None = None):
        _refuse_ranks()
        self._optuna = require_optuna()
        self._trained_here = 0
        self._name = name
        self._storage = self._open(storage)
        self._study = self._optuna.create_study(storage=self._storage, study_name=name, load_if_exists=True)
        settings = json.loads(json.dumps(settings))
        known = self._study.user_attrs.get("settings")
        if settings is not None and known not in (None, settings):
            changed = sorted(key for key in settings | known if settings.get(key) != known.get(key))
            raise ValueError(
                f"storage={storage!r} holds a study {name!r} with other settings ({', '.join(changed)}): "
                "choose another one."
            )
        if settings is not None:
            self._study.set_user_attr("settings", settings)

    def _open(self, storage: str):
        from sqlalchemy.exc import DBAPIError

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", self._optuna.exceptions.ExperimentalWarning)
            for attempt in range(1, ATTEMPTS + 1):
                try:
                    return self._optuna.storages.RDBStorage(storage, heartbeat_interval=HEARTBEAT, grace_period=GRACE)
                except DBAPIError:
                    if attempt == ATTEMPTS:
                        raise
                    time.sleep(random.SystemRandom().random())

    def results(self) -> dict[Point, Run]:
        """Return all runs that have finished."""
        complete = self._optuna.trial.TrialState.COMPLETE
        return {_point(t): Run(t.user_attrs["losses"], t.value) for t in self._study.get_trials(False, (complete,))}

    def run(self, points: Sequence[Point], train: Callable[[Point], Run], title: str) -> dict[Point, Run]:
        """Finish all points, here or in the other processes, and return all finished runs.

        Prints one line for each run that finishes here, and a progress bar on a terminal.
        """
        with tqdm(total=len(points), desc=title, disable=None) as progress, warnings.catch_warnings():
            warnings.simplefilter("ignore", self._optuna.exceptions.ExperimentalWarning)  # heartbeats are, by name
            while True:
                # Before the results: what another process finishes between the two is then in both, and not in neither.
                waiting, running = self._unfinished()
                results = self.results()
                progress.update(sum(point in results for point in points) - progress.n)
                missing = [point for point in points if point not in results]
                if not missing:
                    return results
                free = [point for point in missing if point not in running]
                if not waiting and free:
                    # At random, or processes that start together would all begin with the same point.
                    point = vars(random.SystemRandom().choice(free))
                    self._study.enqueue_trial(point, user_attrs={"point": point})
                if waiting or free:
                    number = len(points) - len(missing) + 1
                    self._run_one(train, f"run {number} of {len(points)}")
                else:
                    time.sleep(HEARTBEAT / 5)

    def _unfinished(self) -> tuple[set[Point], set[Point]]:
        """Return the points that wait in the queue, and those that a living process is at."""
        states = self._optuna.trial.TrialState
        self._optuna.storages.fail_stale_trials(self._study)
        long_ago = datetime.now() - timedelta(seconds=GRACE)
        for trial in self._study.get_trials(False, (states.RUNNING,)):
            if "alive" not in trial.user_attrs and trial.datetime_start < long_ago:  # killed as it began
                self._study.tell(trial.number, state=states.FAIL, skip_if_finished=True)
        trials = [self._study.get_trials(False, (state,)) for state in (states.WAITING, states.RUNNING)]
        return tuple({_point(t) for t in found if "point" in t.user_attrs} for found in trials)

    def _run_one(self, train: Callable[[Point], Run], title: str) -> None:
        def objective(trial) -> float:
            if "point" not in trial.user_attrs:  # another process took what was in the queue
                raise self._optuna.TrialPruned
            trial.suggest_categorical("kind", KINDS)  # for optuna's own tables and dashboard
            trial.suggest_float("learning_rate", *_RATE_RANGE, log=True)
            trial.suggest_int("warmup_steps", *_STEP_RANGE)
            # optuna counts only trials with a sign of life as dead, and gives the first one some time after the start.
            study_id = self._storage.get_study_id_from_name(self._name)
            self._storage.record_heartbeat(
                self._storage.get_trial_id_from_study_id_trial_number(study_id, trial.number)
            )
            trial.set_user_attr("alive", True)
            run = self._train(train, _point(trial), title)
            trial.set_user_attr("losses", run.losses)
            return run.score

        self._study.optimize(objective, n_trials=1)

    def _train(self, train: Callable[[Point], Run], point: Point, title: str) -> Run:
        set_seed(SEED)
        with _quiet(self._trained_here > 0):
            run = train(point)
        self._trained_here += 1
        verdict = detect_instability(run.losses).verdict
        tqdm.write(f"{title}: {point}: loss {run.score:.4g} after {len(run.losses)} steps, {verdict}", sys.stderr)
        return run


@contextmanager
def _quiet(quiet: bool) -> Iterator[None]:
    """Silence transformers while a run that is not the first loads its model and trains: it has said it all before."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    with warnings.catch_warnings():
        if quiet:
            warnings.simplefilter("ignore")
            transformers_logging.set_verbosity_error()
            transformers_logging.disable_progress_bar()
        try:
            yield
        finally:
            transformers_logging.set_verbosity(verbosity)
            if bars:
                transformers_logging.enable_progress_bar()


def _refuse_ranks() -> None:
    """Refuse ranks of one job: each would take its own points, and gradients of different rates would be averaged."""
    ranks = os.environ.get("WORLD_SIZE", "1")
    if int(ranks) > 1:
        raise RuntimeError(
            f"WORLD_SIZE={ranks}: a search cannot run in one distributed training; "
            "start separate processes with one storage, without torchrun."
        )


def _point(trial) -> Point:
    return Point(**trial.user_attrs["point"])


def sqlite_storage(folder: str | os.PathLike) -> str:
    """Return the URL of the database study.db in a folder, which is made if need be."""
    os.makedirs(folder, exist_ok=True)
    return f"sqlite:///{os.path.abspath(os.path.join(folder, 'study.db'))}"


def require_optuna():
    """Import optuna, and keep it from logging every trial.

    Raises:
        ImportError: names the extra that brings it.
    """
    try:
        import optuna
    except ImportError as error:
        raise ImportError(f"Searches need optuna: {install_command('hpo')}.") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
