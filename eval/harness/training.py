"""Training of any method on rows that are encoded already: the same loop, measured in the same way, for all."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from peft import TaskType
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainerState, set_seed

from eval.baselines import METHODS, Prepared, prepare
from eval.baselines.shared import is_quantized, task_type
from peft_scalora.files.checkpoints import last_complete_checkpoint
from peft_scalora.finetuning.trainer import build_trainer
from peft_scalora.maths.scaling import SCALINGS

from .options import check_choices, check_counts, option
from .ranks import this_process
from .record import clock, peak_memory_bytes

UNTRAINED = "none"  # the method that leaves the model as it is
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
POSITIVE = ("r", "steps", "batch_size", "accumulation_steps", "max_length", "save_steps")
NOT_NEGATIVE = ("learning_rate", "warmup_steps", "weight_decay")


@dataclass(frozen=True)
class TrainingOptions:
    """What decides a training, but for its method; all of it is in the run's JSON.

    The learning rate is constant after `warmup_steps`, so that a run may be read off at any step or second.
    The fields from `scaling` on are those of ScaLoRAConfig, and count for "scalora" and "qscalora" only.
    """

    model: str = option(help="local folder or hub id")
    r: int = option(
        8, "rank of an adapter", aliases=["--rank"]
    )  # torchrun takes --r for an option of its own, cut short
    lora_alpha: int | None = option(None, "2 r unless given")
    target_modules: str = option("all-linear", "layers that are adapted")
    learning_rate: float = option(1e-3, "constant after the warmup")
    steps: int = option(100, "optimizer steps")
    batch_size: int = option(16, "rows of a batch, of one process")
    accumulation_steps: int = option(1, "batches of a step")
    warmup_steps: int = option(10, "steps in which the learning rate rises")
    weight_decay: float = option(0.0, "of AdamW")
    max_length: int = option(128, "tokens of a row")
    save_steps: int = option(50, "steps between two checkpoints")
    seed: int = option(0, "of fresh weights and the order of rows")
    dtype: str = option("float32", "of the base model", choices=tuple(DTYPES))
    scaling: str = option("column", "rule by which ScaLoRA scales columns", choices=tuple(SCALINGS))
    scaling_interval: int = option(10, "steps between two rescalings")
    smoothness: str = option("auto", "the smoothness constant, or auto")
    accumulator_rank: int | None = option(None, "rank R of the accumulated change; 7 r unless given")
    moment_transport: bool = option(True, "whether a rescaling carries the optimizer's moments along")

    def __post_init__(self):
        check_choices(self)
        check_counts(self, POSITIVE)
        for name in NOT_NEGATIVE:
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)} must be a number that is not below 0.")

        _ = self.smoothness_constant  # which refuses what is no number

    @property
    def alpha(self) -> int:
        """Return lora_alpha, or its default."""
        return 2 * self.r if self.lora_alpha is None else self.lora_alpha

    @property
    def smoothness_constant(self) -> float | str:
        """Return the number that `smoothness` is, or "auto"."""
        try:
            return "auto" if self.smoothness == "auto" else float(self.smoothness)
        except ValueError as error:
            raise ValueError(f"smoothness={self.smoothness!r} must be a number, or auto.") from error


@dataclass(frozen=True)
class Training(TrainingOptions):
    """Everything that decides a run, apart from its task and rows."""

    method: str = option("scalora", "what is trained", choices=(*METHODS, UNTRAINED))
    eval_steps: int = option(50, "steps between two points of the curve")

    def __post_init__(self):
        super().__post_init__()
        check_counts(self, ["eval_steps"])


class Curve(TrainerCallback):
    """Seconds for every logged loss, and `evaluate()` every `eval_steps`, outside those seconds.

    They are of training and of making the model ready for it (`seconds`), not of writing checkpoints.
    All of it goes into Trainer's log, and so into its checkpoints: a run that is continued continues its curve.
    """

    def __init__(self, evaluate: Callable[[], dict[str, float]], every: int, seconds: float):
        self.evaluate, self.every, self.trainer = evaluate, every, None
        self.seconds = seconds

    def on_train_begin(self, args, state, control, **kwargs):
        self.seconds = next((e["seconds"] for e in reversed(state.log_history) if "seconds" in e), self.seconds)
        self._started = clock()

    def on_log(self, args, state, control, **kwargs):
        self._logged = clock()
        state.log_history[-1]["seconds"] = self.seconds + self._logged - self._started

    def on_save(self, args, state, control, **kwargs):
        self._started += clock() - self._logged

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self.seconds += clock() - self._started
            self._started = clock()
            metrics = self.evaluate()
            self._started = clock()
            should_log = control.should_log
            self.trainer.log({f"eval_{name}": value for name, value in metrics.items()})
            control.should_log = should_log  # which logging has reset: the loss of this step is still to come
        if state.global_step == state.max_steps:
            control.should_save = False  # Trainer makes one step too many when it continues from the last one


def train(
    settings: Training,
    model: torch.nn.Module,
    rows: Dataset,
    collator: Callable,
    evaluate: Callable[[torch.nn.Module], dict[str, float]],
    folder: str,
    trainer_class: Callable[..., Trainer] = Trainer,
) -> tuple[torch.nn.Module, dict]:
    """Train `model` by `settings.method`, or continue, and return it with the run's figures; "none" only evaluates it.

    `evaluate(model)` returns the curve's metrics. Checkpoints go to `folder`, the newest of them stays there.

    Raises:
        ValueError: a row is longer than what the model reads, or one process would use several GPUs.
    """
    _check_rows(settings, model, rows)
    set_seed(settings.seed)
    if not is_quantized(model):  # which is where it has to be
        model = model.to(this_process().device)
    if settings.method == UNTRAINED:
        return _untrained(model, evaluate)
    started = clock()
    prepared = prepare(model, settings, _first_batches(rows, collator, settings.batch_size))
    setup_seconds = clock() - started
    curve = Curve(lambda: _in_eval_mode(evaluate, trainer.model), settings.eval_steps, setup_seconds)
    trainer = build_trainer(
        prepared.model,
        _arguments(settings, folder) | prepared.arguments,
        classifier=task_type(prepared.model) == TaskType.SEQ_CLS,
        trainer_class=trainer_class,
        train_dataset=rows,
        data_collator=collator,
        callbacks=[curve, *prepared.callbacks],
        optimizer_cls_and_kwargs=prepared.optimizer,
    )
    _refuse_several_gpus(trainer.args.n_gpu)
    curve.trainer = trainer
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(folder))
    return prepared.model, _figures(prepared, trainer.state, curve.seconds, setup_seconds)


def _check_rows(settings: Training, model: torch.nn.Module, rows: Dataset) -> None:
    longest = max(len(row["input_ids"]) for row in rows)
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and longest > limit:
        raise ValueError(
            f"max_length={settings.max_length} leaves a training row of {longest} tokens, and the model reads {limit}: "
            f"choose max_length={limit} or less."
        )


def _refuse_several_gpus(count: int) -> None:
    if count > 1:
        raise ValueError(
            f"one process sees {count} GPUs, and would split each batch over them: use accelerate launch, or "
            "CUDA_VISIBLE_DEVICES=0 for one of them."
        )


def _arguments(settings: Training, folder: str) -> dict:
    """Return the fields of TrainingArguments."""
    return {
        "output_dir": folder,
        "max_steps": settings.steps,
        "per_device_train_batch_size": settings.batch_size,
        "gradient_accumulation_steps": settings.accumulation_steps,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": settings.warmup_steps,
        "weight_decay": settings.weight_decay,
        "logging_steps": 1,
        "save_steps": settings.save_steps,
        "save_total_limit": 1,
        "seed": settings.seed,
        "include_num_input_tokens_seen": "non_padding",
        "remove_unused_columns": False,
    }


def _figures(prepared: Prepared, state: TrainerState, train_seconds: float, setup_seconds: float) -> dict:
    """Return what a run's JSON has of its training."""
    return {
        "trainable_parameters": sum(p.numel() for p in prepared.model.parameters() if p.requires_grad),
        "effective_rank": _mean_rank(prepared),
        "steps": state.global_step,
        "tokens": state.num_input_tokens_seen,
        "setup_seconds": setup_seconds,
        "train_seconds": train_seconds,
        "peak_memory_bytes": peak_memory_bytes(),
        **_points(state.log_history),
    }


def _untrained(model: torch.nn.Module, evaluate: Callable) -> tuple[torch.nn.Module, dict]:
    nothing = {"trainable_parameters": 0, "effective_rank": None, "steps": 0, "tokens": 0, "train_seconds": 0.0}
    point = {"step": 0, "seconds": 0.0, **_in_eval_mode(evaluate, model)}
    return model, {**nothing, "peak_memory_bytes": peak_memory_bytes(), "losses": [], "curve": [point]}


def _in_eval_mode(function: Callable, model: torch.nn.Module):
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return function(model)
    finally:
        model.train(was_training)


def _first_batches(rows: Dataset, collator: Callable, batch_size: int, count: int = 64) -> list[dict]:
    """Return the first `count` rows in batches, for initialisations by data."""
    first = [rows[i] for i in range(min(len(rows), count))]
    return [collator(first[start : start + batch_size]) for start in range(0, len(first), batch_size)]


def _mean_rank(prepared: Prepared) -> float | None:
    """Return the mean rank of the weight change, for the methods that know it."""
    if prepared.effective_rank is None:
        return None
    ranks = prepared.effective_rank(prepared.model)
    return sum(ranks.values()) / len(ranks)


def _points(log: list[dict]) -> dict:
    """Return the loss of every step, and the evaluations, each with the seconds of training until then."""
    losses = [(e["step"], round(e["seconds"], 3), e["loss"]) for e in log if "loss" in e]
    curve = [
        {
            "step": e["step"],
            "seconds": round(e["seconds"], 3),
            **{k.removeprefix("eval_"): v for k, v in e.items() if k.startswith("eval_")},
        }
        for e in log
        if any(k.startswith("eval_") for k in e)
    ]
    return {"losses": losses, "curve": curve}


def settings_of(settings: TrainingOptions, **others) -> dict:
    """Return what goes into the run's JSON: of a model's folder its name alone, of a hub id all of it."""
    is_folder = os.path.isdir(settings.model)
    name = os.path.basename(settings.model.rstrip(os.sep)) if is_folder else settings.model
    return asdict(settings) | others | {"model": name}
