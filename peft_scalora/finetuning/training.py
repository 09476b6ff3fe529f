"""The Trainer of a run: its arguments, what it records, and one line a log."""

from __future__ import annotations

import math
import statistics
import sys
import time

import torch
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    PrinterCallback,
    Trainer,
    TrainerCallback,
)

from ..callbacks import ScaLoRACallback
from .models import weights_dtype
from .output import is_main_process
from .settings import CAUSAL_LM, FinetuneSettings
from .trainer import build_trainer

_SHOWN = {"loss": "loss", "scalora/effective_rank": "rank", "learning_rate": "learning rate", "grad_norm": "gradient"}


class NonFiniteLoss(RuntimeError):
    """Error of a training whose loss is nan or infinite; the last checkpoint is in the output folder."""


class StopOnNonFiniteLoss(TrainerCallback):
    """Callback that raises NonFiniteLoss at the first log whose loss is not finite."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        loss = (logs or {}).get("loss", 0.0)
        if not math.isfinite(float(loss)):
            raise NonFiniteLoss(
                f"loss={loss} at step {state.global_step} with learning_rate={args.learning_rate}: lower it, or add "
                f"warmup. The checkpoints below {args.output_dir} are as they were saved."
            )


class LogLines(TrainerCallback):
    """Callback that prints one line a log: the step and its figures."""

    def __init__(self):
        self._figures: dict[str, float] = {}

    def on_log(self, args, state, control, logs=None, **kwargs):
        self._figures.update(logs or {})
        evaluated = {name: value for name, value in self._figures.items() if name.startswith("eval_")}
        if not evaluated and "loss" not in self._figures:
            return  # the figures of ScaLoRA come first, the loss follows
        shown = _SHOWN | {name: name.replace("_", " ", 1) for name in evaluated if not name.endswith(_TIMINGS)}
        parts = [f"{title} {self._figures[name]:.4g}" for name, title in shown.items() if name in self._figures]
        say(f"step {state.global_step}/{state.max_steps}  " + "  ".join(parts))
        self._figures.clear()


_TIMINGS = ("_runtime", "_per_second")


class RecordingTrainer(Trainer):
    """Trainer that keeps the loss and the duration of every optimizer step."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.step_losses: list[torch.Tensor] = []
        self.step_seconds: list[float] = []
        self._loss = 0.0
        self.add_callback(_OfEachStep(self))

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self._loss = self._loss + loss
        return loss

    def end_step(self, seconds: float) -> None:
        """Take the loss that the batches of a step add up to; it stays on the device."""
        self.step_losses.append(self._loss)
        self.step_seconds.append(seconds)
        self._loss = 0.0

    def median_seconds(self) -> float | None:
        """Return the median duration of a step, a fairer figure than the mean on a busy machine."""
        return statistics.median(self.step_seconds) if self.step_seconds else None

    def losses(self) -> list[float]:
        """Return the loss of every step of this process, after what was logged before it resumed."""
        start = self.state.global_step - len(self.step_losses)
        logged = [entry["loss"] for entry in self.state.log_history if "loss" in entry and entry["step"] <= start]
        return logged + [float(loss) for loss in self.step_losses]


class _OfEachStep(TrainerCallback):
    def __init__(self, trainer: RecordingTrainer):
        self.trainer = trainer

    def on_step_begin(self, args, state, control, **kwargs):
        self._started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.end_step(time.perf_counter() - self._started)


def say(text: str) -> None:
    """Print a line of progress, once in a run of several processes."""
    if is_main_process():
        print(text, file=sys.stderr, flush=True)


def training_arguments(settings: FinetuneSettings) -> dict:
    """Return what the settings mean to Trainer, as fields of TrainingArguments."""
    during = {"save_steps": settings.save_steps}
    if settings.gradient_checkpointing:
        during |= {"gradient_checkpointing": True}
    if settings.eval_steps:
        during |= {"eval_strategy": "steps", "eval_steps": settings.eval_steps}
    if settings.early_stopping_patience:  # the best has to be among the checkpoints
        during |= {"save_steps": settings.eval_steps, "load_best_model_at_end": True, "metric_for_best_model": "loss"}
    return {
        "output_dir": settings.output,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": settings.lr_scheduler_type,
        "per_device_train_batch_size": settings.batch_size,
        "per_device_eval_batch_size": settings.batch_size,
        "gradient_accumulation_steps": settings.gradient_accumulation_steps,
        "num_train_epochs": settings.epochs,
        "max_steps": settings.max_steps,
        "warmup_steps": settings.warmup_ratio,
        "weight_decay": settings.weight_decay,
        "logging_steps": settings.logging_steps,
        "save_total_limit": 2,
        "report_to": settings.report_to.split(","),
        "seed": settings.seed,
        "bf16": weights_dtype(settings) is torch.bfloat16,
        "disable_tqdm": True,
        **during,
    }


def make_recording_trainer(settings: FinetuneSettings, model, tokenizer, train_rows, eval_rows) -> RecordingTrainer:
    """Return the Trainer of a run, with the callbacks that a run needs."""
    labelled = settings.task != CAUSAL_LM
    trainer = build_trainer(
        model,
        training_arguments(settings),
        classifier=labelled,
        trainer_class=RecordingTrainer,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        data_collator=DataCollatorWithPadding(tokenizer) if labelled else DataCollatorForSeq2Seq(tokenizer),
        compute_metrics=classification_metrics if labelled else None,
        callbacks=[StopOnNonFiniteLoss()],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(ScaLoRACallback(trainer))  # the rank of a LoRA adapter is worth seeing too
    trainer.add_callback(LogLines())
    if settings.early_stopping_patience:
        trainer.add_callback(EarlyStoppingCallback(settings.early_stopping_patience))
    return trainer


def classification_metrics(prediction) -> dict[str, float]:
    """Return accuracy and Matthews correlation (classes), or Pearson correlation (one real value)."""
    scores, labels = prediction
    if scores.shape[-1] == 1:
        from scipy.stats import pearsonr

        return {"pearson": float(pearsonr(scores[:, 0], labels).statistic)}
    from sklearn.metrics import accuracy_score, matthews_corrcoef

    guesses = scores.argmax(-1)
    return {"accuracy": accuracy_score(labels, guesses), "matthews": matthews_corrcoef(labels, guesses)}
