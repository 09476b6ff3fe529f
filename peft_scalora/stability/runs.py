"""Short training runs for a search, and the optuna study that they are points of. Needs the extra `hpo` (optuna)."""

from __future__ import annotations

import json
import math
import os
import random
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from torch.utils.data import Subset
from torch.utils.weak import WeakIdKeyDictionary
from tqdm import tqdm
from transformers import Trainer, TrainerCallback, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from ..version import install_command

FINAL_SHARE = 0.1  # of the losses, whose mean is a run's score when there is no evaluation
SEED = 0  # of every run: scores are not to depend on the order of the points, which is random
KINDS = ("sweep", "check", "warmup")
ATTEMPTS = 5  # to open a storage, as processes that start together get in each other's way creating its tables
HEARTBEAT, GRACE = 5, 30  # seconds: between signs of life, and without one until a run counts as dead
_RATE_RANGE, _STEP_RANGE = (1e-15, 1e6), (0, 10**9)  # wide: optuna has to accept whatever is enqueued
_trained = WeakIdKeyDictionary()  # parameters that a run of this process has trained


@dataclass
class Run:
    """Losses of every step of a short training run, and the score it is judged by: lower is better."""

    losses: list[float]
    score: float


class _Recorder(TrainerCallback):
    """Every logged value of one name; ends a run in which it is not finite."""

    def __init__(self, name: str):
        self.name = name
        self.values: list[float] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.name in (logs or {}):
            self.values.append(float(logs[self.name]))
            if not math.isfinite(self.values[-1]):
                control.should_training_stop = True


def finish(result: Trainer | Sequence[float], learning_rate: float, **arguments) -> Run:
    """The run that `train` returned: a Trainer is trained here, losses are taken as they are.

    The score is the loss on the Trainer's evaluation data after training, or the mean of the last tenth of the losses.

    Args:
        learning_rate: what the run was to use.
        arguments: TrainingArguments to set on a Trainer.

    Raises:
        ValueError: before training, a Trainer that cannot be compared with those of the other points; no losses.
    """
    if isinstance(result, Trainer):
        _check_trainer(result, learning_rate)
        losses = _train(result, "loss", **arguments)
        score = final_loss(losses)
        if result.eval_dataset is not None and math.isfinite(score):
            score = float(result.evaluate()["eval_loss"])
        return Run(losses, score if math.isfinite(score) else math.inf)
    losses = [float(loss) for loss in result]
    if not losses:
        raise ValueError("train returned no losses: return a Trainer, or the training loss of every step.")
    return Run(losses, final_loss(losses))


def finish_evaluating(result: Trainer | Sequence[float], learning_rate: float, steps: int, rows: int) -> Run:
    """The run that `train` returned, evaluated after each of `steps` steps.

    That is the loss on the first `rows` rows of a Trainer's evaluation data; the training loss where there are none.
    """
    if not isinstance(result, Trainer) or result.eval_dataset is None:
        return finish(result, learning_rate, max_steps=steps)
    _check_trainer(result, learning_rate)
    result.eval_dataset = Subset(result.eval_dataset, range(min(rows, len(result.eval_dataset))))
    losses = _train(result, "eval_loss", max_steps=steps, eval_strategy=IntervalStrategy.STEPS, eval_steps=1)
    return Run(losses, final_loss(losses))


def _check_trainer(trainer: Trainer, learning_rate: float) -> None:
    rate, data = trainer.args.learning_rate, trainer.eval_dataset
    if not math.isclose(rate, learning_rate):
        raise ValueError(f"train({learning_rate:g}) returned a Trainer with learning_rate={rate:g}: use the given one.")
    if isinstance(data, dict):
        raise ValueError(f"eval_dataset has several data sets ({', '.join(data)}): give one, which runs are judged by.")
    if any(parameter in _trained for parameter in trainer.model.parameters()):
        raise ValueError(
            f"train({learning_rate:g}) returned a Trainer of a model that an earlier run has trained already: "
            "make a new model in `train`, or a copy.deepcopy of an untrained one."
        )


def _train(trainer: Trainer, name: str, **arguments) -> list[float]:
    """Train, and return what was logged under `name`, every step."""
    settings = {
        "logging_strategy": IntervalStrategy.STEPS,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": SaveStrategy.NO,
        "eval_strategy": IntervalStrategy.NO,
    }
    for field, value in (settings | arguments).items():
        setattr(trainer.args, field, value)
    for shown in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(shown)
    recorder = _Recorder(name)
    trainer.add_callback(recorder)
    _trained.update((parameter, None) for parameter in trainer.model.parameters() if parameter.requires_grad)
    trainer.train()
    return recorder.values


def final_loss(losses: Sequence[float]) -> float:
    """Mean of the last tenth of the losses; infinite if any loss is not finite."""
    if not all(map(math.isfinite, losses)):
        return math.inf
    last = losses[-max(1, round(FINAL_SHARE * len(losses))) :]
    return sum(last) / len(last)


@dataclass(frozen=True)
class Point:
    """What one run of a search is given."""

    kind: str
    learning_rate: float
    warmup_steps: int = 0
    check_steps: int = 0
    check_rows: int = 0


class Study:
    """The finished runs of a search in an optuna study, which several processes fill together.

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
        """All runs that have finished."""
        complete = self._optuna.trial.TrialState.COMPLETE
        return {_point(t): Run(t.user_attrs["losses"], t.value) for t in self._study.get_trials(False, (complete,))}

    def run(self, points: Sequence[Point], train: Callable[[Point], Run], title: str) -> dict[Point, Run]:
        """Finish all points, here or in the other processes, with a progress bar; returns all finished runs."""
        with tqdm(total=len(points), desc=title) as progress, warnings.catch_warnings():
            warnings.simplefilter("ignore", self._optuna.exceptions.ExperimentalWarning)  # heartbeats are, by name
            while True:
                results = self.results()
                progress.update(sum(point in results for point in points) - progress.n)
                missing = [point for point in points if point not in results]
                if not missing:
                    return results
                waiting, running = self._unfinished()
                free = [point for point in missing if point not in running]
                if not waiting and free:
                    # At random, or processes that start together would all begin with the same point.
                    point = vars(random.SystemRandom().choice(free))
                    self._study.enqueue_trial(point, user_attrs={"point": point})
                if waiting or free:
                    self._run_one(train)
                else:
                    time.sleep(HEARTBEAT / 5)

    def _unfinished(self) -> tuple[set[Point], set[Point]]:
        """Points that wait in the queue, and those that a living process is at."""
        states = self._optuna.trial.TrialState
        self._optuna.storages.fail_stale_trials(self._study)
        long_ago = datetime.now() - timedelta(seconds=GRACE)
        for trial in self._study.get_trials(False, (states.RUNNING,)):
            if "alive" not in trial.user_attrs and trial.datetime_start < long_ago:  # killed as it began
                self._study.tell(trial.number, state=states.FAIL, skip_if_finished=True)
        trials = [self._study.get_trials(False, (state,)) for state in (states.WAITING, states.RUNNING)]
        return tuple({_point(t) for t in found if "point" in t.user_attrs} for found in trials)

    def _run_one(self, train: Callable[[Point], Run]) -> None:
        def objective(trial) -> float:
            if "point" not in trial.user_attrs:  # another process took what was in the queue
                raise self._optuna.TrialPruned
            trial.suggest_categorical("kind", KINDS)  # for optuna's own tables and dashboard
            trial.suggest_float("learning_rate", *_RATE_RANGE, log=True)
            trial.suggest_int("warmup_steps", *_STEP_RANGE)
            # optuna counts only trials with a sign of life as dead, and gives the first one some time after the start.
            self._storage.record_heartbeat(trial._trial_id)
            trial.set_user_attr("alive", True)
            set_seed(SEED)
            run = train(_point(trial))
            trial.set_user_attr("losses", run.losses)
            return run.score

        self._study.optimize(objective, n_trials=1)


def _refuse_ranks() -> None:
    """Ranks of one job would each take points of their own, and average gradients of different learning rates."""
    ranks = os.environ.get("WORLD_SIZE", "1")
    if int(ranks) > 1:
        raise RuntimeError(
            f"WORLD_SIZE={ranks}: a search cannot run in one distributed training; "
            "start separate processes with one storage, without torchrun."
        )


def _point(trial) -> Point:
    return Point(**trial.user_attrs["point"])


def sqlite_storage(folder: str | os.PathLike) -> str:
    """The URL of the database study.db in a folder, which is made if need be."""
    os.makedirs(folder, exist_ok=True)
    return f"sqlite:///{os.path.abspath(os.path.join(folder, 'study.db'))}"


def require_optuna():
    """optuna, quiet.

    Raises:
        ImportError: names the extra that brings it.
    """
    try:
        import optuna
    except ImportError as error:
        raise ImportError(f"Searches need optuna: {install_command('hpo')}.") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
