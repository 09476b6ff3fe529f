"""Finish the short trainings of a search: train what the user's function returns, and score it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch.utils.data import Subset
from torch.utils.weak import WeakIdKeyDictionary
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

FINAL_SHARE = 0.1  # of the losses, whose mean is a run's score when there is no evaluation
_trained = WeakIdKeyDictionary()  # parameters that a run of this process has trained


@dataclass
class Run:
    """Hold the losses of every step of a short training run, and the score it is judged by: lower is better."""

    losses: list[float]
    score: float


class _Recorder(TrainerCallback):
    """Keep every logged value of one name, and end a run in which it is not finite."""

    def __init__(self, name: str):
        self.name = name
        self.values: list[float] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.name in (logs or {}):
            self.values.append(float(logs[self.name]))
            if not math.isfinite(self.values[-1]):
                control.should_training_stop = True


def finish(result: Trainer | Sequence[float], learning_rate: float, **arguments) -> Run:
    """Finish the run that `train` returned: a Trainer is trained here, losses are taken as they are.

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
    """Finish the run that `train` returned, evaluating it after each of `steps` steps.

    The losses are those on the first `rows` rows of a Trainer's evaluation data; the training losses where it has none.
    """
    if not isinstance(result, Trainer) or result.eval_dataset is None:
        return finish(result, learning_rate, max_steps=steps)
    _check_trainer(result, learning_rate)
    result.eval_dataset = Subset(result.eval_dataset, range(min(rows, len(result.eval_dataset))))
    losses = _train(result, "eval_loss", max_steps=steps, eval_strategy=IntervalStrategy.STEPS, eval_steps=1)
    return Run(losses, final_loss(losses))


def _check_trainer(trainer: Trainer, learning_rate: float) -> None:
    rate = trainer.args.learning_rate
    data = trainer.eval_dataset
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
    """Train, and return the value logged under `name` at every step."""
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
    """Return the mean of the last tenth of the losses; infinite if any loss is not finite."""
    if not all(map(math.isfinite, losses)):
        return math.inf
    last = losses[-max(1, round(FINAL_SHARE * len(losses))) :]
    return sum(last) / len(last)
