"""Hyperparameter search for full fine-tuning: every trial is a run as `dense` is. Needs the extra `hpo` (optuna)."""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec

from torch import nn
from tqdm import tqdm

from eval.harness.record import clock

from .common import Context, Row, load, save

__all__ = ["ROWS", "build", "load", "misfit"]

ROWS = {"search": Row("costs as many short runs as it has trials; the model is as large and slow as dense", None)}
STUDY = "full fine-tuning"


def misfit(row: Row, base: nn.Module) -> str | None:
    return None if find_spec("optuna") else "optuna is not installed: pip install '.[hpo]'"


def build(row: Row, context: Context, folder: str) -> nn.Module:
    """Train with the settings that were best on the dev rows; a study that was interrupted goes on."""
    study = search(row, context)
    context.figures["best"] = study.best_params
    context.figures["trials"] = [{**trial.params, context.task.metric: trial.value} for trial in _complete(study)]
    model = context.fine_tune(context.base(row), "full", **changes(context, study.best_trial))
    save(model, folder)
    return model


def search(row: Row, context: Context):
    """Return the optuna study with `context.search_trials` complete trials, in an SQLite file of its own.

    A trial's sampler is seeded by the number of those before it, so that an interrupted study goes on as it would have.
    """
    import optuna

    os.makedirs(context.scratch, exist_ok=True)
    storage = f"sqlite:///{context.scratch}/study.db"
    study = optuna.create_study(study_name=STUDY, storage=storage, load_if_exists=True, direction="maximize")
    done = _complete(study)
    context.earlier_seconds += sum(trial.user_attrs["seconds"] for trial in done)
    numbers = range(len(done), context.search_trials)
    for number in tqdm(numbers, desc="trials", initial=len(done), total=context.search_trials):
        study.sampler = optuna.samplers.TPESampler(seed=1000 * context.training.seed + number)
        study.optimize(lambda trial, number=number: objective(row, context, trial, number), n_trials=1)
    return study


def objective(row: Row, context: Context, trial, number: int) -> float:
    """Return the task's metric on the dev rows after full fine-tuning with the settings of `trial`."""
    started, before, checkpoints = clock(), context.earlier_seconds, f"trial-{number}"
    model = context.fine_tune(context.base(row), "full", checkpoints=checkpoints, **changes(context, trial))
    score = context.task.score(model, "dev")
    shutil.rmtree(os.path.join(context.scratch, checkpoints), ignore_errors=True)  # none in a short run
    trial.set_user_attr("seconds", clock() - started + context.earlier_seconds - before)
    return score.metrics[context.task.metric]


def changes(context: Context, trial) -> dict:
    """Return learning rate, batch size and steps: `share` of the rows that a run with the given settings sees."""
    middle, batch = context.full_learning_rate, context.training.batch_size
    learning_rate = trial.suggest_float("learning_rate", middle / 10, middle * 10, log=True)
    batch_size = trial.suggest_categorical("batch_size", [max(1, batch // 2), batch])
    share = trial.suggest_categorical("share", [0.5, 1.0])
    steps = max(1, round(share * context.training.steps * batch / batch_size))
    return {"learning_rate": learning_rate, "batch_size": batch_size, "steps": steps}


def _complete(study) -> list:
    from optuna.trial import TrialState

    return study.get_trials(states=[TrialState.COMPLETE])
