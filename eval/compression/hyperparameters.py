"""Hyperparameter search for full fine-tuning with `Trainer.hyperparameter_search`. Needs the extra `hpo` (optuna)."""

from __future__ import annotations

import os
from functools import partial
from importlib.util import find_spec

import torch
from harness.training import DTYPES
from torch import nn
from tqdm import tqdm
from transformers import Trainer, TrainingArguments

from .common import Context, Row, load, save

__all__ = ["ROWS", "build", "load", "misfit"]

ROWS = {"search": Row("costs as many short runs as it has trials; the model is as large and slow as dense", None)}
STUDY = "full fine-tuning"


def misfit(row: Row, base: nn.Module) -> str | None:
    return None if find_spec("optuna") else "optuna is not installed: pip install 'peft-scalora[hpo]'"


def build(row: Row, context: Context, folder: str) -> nn.Module:
    """Train with the settings that were best on the dev rows; a study that was interrupted goes on."""
    study = search(context)
    best = study.best_trial.params
    context.figures["best"] = best
    context.figures["trials"] = [
        {**trial.params, context.task.metric: trial.value} for trial in study.get_trials(states=[_complete()])
    ]
    batch = best["per_device_train_batch_size"]
    steps = max(1, round(best["num_train_epochs"] * len(context.task.train) / batch))
    changes = {"learning_rate": best["learning_rate"], "batch_size": batch, "steps": steps}
    model = context.fine_tune(context.base(row), "full", **changes)
    save(model, folder)
    return model


def search(context: Context):
    """The optuna study with `context.search_trials` finished trials, in an SQLite file of its own."""
    import optuna

    os.makedirs(context.scratch, exist_ok=True)
    storage = f"sqlite:///{context.scratch}/study.db"
    open_study = partial(
        optuna.create_study, study_name=STUDY, storage=storage, load_if_exists=True, direction="maximize"
    )
    done = len(open_study().get_trials(states=[_complete()]))
    with tqdm(total=context.search_trials, initial=done, desc="trials") as progress:
        trainer = ScoredTrainer(context, progress)
        if done < context.search_trials:
            trainer.hyperparameter_search(
                hp_space=partial(space, context),
                compute_objective=lambda metrics: metrics["eval_objective"],
                n_trials=context.search_trials - done,
                direction="maximize",
                backend="optuna",
                study_name=STUDY,
                storage=storage,
                load_if_exists=True,
                sampler=optuna.samplers.TPESampler(seed=1000 * context.training.seed + done),
            )
    return open_study()


def space(context: Context, trial) -> dict:
    """Learning rate, batch size and epochs; at most as many rows are seen as in a run with the given settings."""
    epochs = context.training.steps * context.training.batch_size / len(context.task.train)
    middle, batch = context.full_learning_rate, context.training.batch_size
    return {
        "learning_rate": trial.suggest_float("learning_rate", middle / 10, middle * 10, log=True),
        "per_device_train_batch_size": trial.suggest_categorical(
            "per_device_train_batch_size", [max(1, batch // 2), batch]
        ),
        "num_train_epochs": trial.suggest_categorical("num_train_epochs", [epochs / 2, epochs]),
    }


def _complete():
    from optuna.trial import TrialState

    return TrialState.COMPLETE


class ScoredTrainer(Trainer):
    """Trainer of fresh models whose evaluation is the task's own, on the dev rows."""

    def __init__(self, context: Context, progress: tqdm):
        self.context, self.progress = context, progress
        arguments = TrainingArguments(
            output_dir=os.path.join(context.scratch, "search"),
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=context.training.warmup_steps,
            save_strategy="no",
            report_to="none",
            seed=context.training.seed,
            use_cpu=not torch.cuda.is_available(),
            dataloader_pin_memory=torch.cuda.is_available(),
            remove_unused_columns=False,
            disable_tqdm=True,
        )
        super().__init__(
            model_init=lambda: context.task.fresh(DTYPES[context.training.dtype]),
            args=arguments,
            train_dataset=context.task.train,
            data_collator=context.task.collator,
        )

    def evaluate(self, *arguments, **options):
        score = self.context.task.score(self.model.eval(), "dev")
        self.progress.update()
        return {"eval_objective": score.metrics[self.context.task.metric]}
