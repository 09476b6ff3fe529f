"""Training of any method on rows that are encoded already: the same loop, measured in the same way, for all."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields

import torch
from peft import TaskType
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from eval.baselines import METHODS, Prepared, prepare
from eval.baselines.shared import is_quantized, task_type
from peft_scalora.files.checkpoints import last_complete_checkpoint
from peft_scalora.maths.scaling import SCALINGS

from .ranks import this_process
from .record import clock, peak_memory_bytes

UNTRAINED = "none"  # the method that leaves the model as it is
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CHOICES = {"method": (*METHODS, UNTRAINED), "dtype": tuple(DTYPES), "scaling": SCALINGS}
POSITIVE = ("r", "steps", "batch_size", "accumulation_steps", "max_length", "eval_steps", "save_steps")
NOT_NEGATIVE = ("learning_rate", "warmup_steps", "weight_decay")


@dataclass(frozen=True)
class Training:
    """Everything that decides a run, apart from its task and rows; all of it is in the run's JSON.

    The learning rate is constant after `warmup_steps`, so that a run may be read off at any step or second.
    The fields from `scaling` on are those of ScaLoRAConfig, and count for "scalora" and "qscalora" only; without
    `moment_transport` a rescaling leaves the optimizer's moments as they are.
    """

    model: str
    method: str = "scalora"
    r: int = 8
    lora_alpha: int | None = None  # None is 2 r
    target_modules: str = "all-linear"
    learning_rate: float = 1e-3
    steps: int = 100
    batch_size: int = 16
    accumulation_steps: int = 1
    warmup_steps: int = 10
    weight_decay: float = 0.0
    max_length: int = 128
    eval_steps: int = 50  # a point of the curve
    save_steps: int = 50
    seed: int = 0
    dtype: str = "float32"  # of the base model
    scaling: str = "column"
    scaling_interval: int = 10
    smoothness: float | str = "auto"
    accumulator_rank: int | None = None
    moment_transport: bool = True

    def __post_init__(self):
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {', '.join(choices)}.")
        check_counts(self, POSITIVE)
        for name in NOT_NEGATIVE:
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)} must be a number that is not below 0.")

    @property
    def alpha(self) -> int:
        return 2 * self.r if self.lora_alpha is None else self.lora_alpha


def check_counts(settings, names: Sequence[str]) -> None:
    """
    Raises:
        ValueError: one of these fields is below 1; None passes.
    """
    for name in names:
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1.")


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
    longest, limit = max(len(row["input_ids"]) for row in rows), getattr(model.config, "max_position_embeddings", None)
    if limit is not None and longest > limit:
        raise ValueError(
            f"max_length={settings.max_length} leaves a training row of {longest} tokens, and the model reads {limit}: "
            f"choose max_length={limit} or less."
        )
    set_seed(settings.seed)
    if not is_quantized(model):  # which is where it has to be
        model = model.to(this_process().device)
    if settings.method == UNTRAINED:
        return _untrained(model, evaluate)
    started = clock()
    prepared = prepare(model, settings, _first_batches(rows, collator, settings.batch_size))
    setup_seconds = clock() - started
    curve = Curve(lambda: _in_eval_mode(evaluate, trainer.model), settings.eval_steps, setup_seconds)
    fields = {
        "output_dir": folder,
        "max_steps": settings.steps,
        "per_device_train_batch_size": settings.batch_size,
        "gradient_accumulation_steps": settings.accumulation_steps,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": settings.warmup_steps,
        "weight_decay": settings.weight_decay,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_steps": settings.save_steps,
        "save_total_limit": 1,
        "seed": settings.seed,
        "include_num_input_tokens_seen": "non_padding",
        "report_to": "none",
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "remove_unused_columns": False,
    }
    arguments = TrainingArguments(**(fields | prepared.arguments))
    if arguments.n_gpu > 1:
        raise ValueError(
            f"one process sees {arguments.n_gpu} GPUs, and would split each batch over them: use accelerate launch, or "
            "CUDA_VISIBLE_DEVICES=0 for one of them."
        )
    trainer = trainer_class(
        model=prepared.model,
        args=arguments,
        train_dataset=rows,
        data_collator=collator,
        callbacks=[curve, *prepared.callbacks],
        optimizer_cls_and_kwargs=prepared.optimizer,
    )
    if task_type(prepared.model) == TaskType.SEQ_CLS:
        # Its loss is a mean over the batch: Trainer would take it for one over all batches of a step, and add them up.
        trainer.model_accepts_loss_kwargs = False
    curve.trainer = trainer
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(folder))
    figures = {
        "trainable_parameters": sum(p.numel() for p in prepared.model.parameters() if p.requires_grad),
        "effective_rank": _mean_rank(prepared),
        "steps": trainer.state.global_step,
        "tokens": trainer.state.num_input_tokens_seen,
        "setup_seconds": setup_seconds,
        "train_seconds": curve.seconds,
        "peak_memory_bytes": peak_memory_bytes(),
        **_points(trainer.state.log_history),
    }
    return prepared.model, figures


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
    """The first `count` rows, for initialisations by data."""
    first = [rows[i] for i in range(min(len(rows), count))]
    return [collator(first[start : start + batch_size]) for start in range(0, len(first), batch_size)]


def _mean_rank(prepared: Prepared) -> float | None:
    """Mean rank of the weight change, for the methods that know it."""
    if prepared.effective_rank is None:
        return None
    ranks = prepared.effective_rank(prepared.model)
    return sum(ranks.values()) / len(ranks)


def _points(log: list[dict]) -> dict:
    """Loss of every step, and the evaluations, each with the seconds of training until then."""
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


def add_arguments(parser, without: Sequence[str] = ()) -> None:
    """One option for every field of `Training`, and "save_adapter", but for those `without`."""
    if "save_adapter" not in without:
        parser.add_argument("--save-adapter", action="store_true", help="keep the trained adapter in OUTPUT.adapter")
    kinds = {"int": int, "float": float, "str": str, "int | None": int, "float | str": _number_or_word}
    for field in fields(Training):
        if field.name in without:
            continue
        name = "--" + field.name.replace("_", "-")
        if field.type == "bool":
            parser.add_argument(f"--no-{name[2:]}", dest=field.name, action="store_false", help="an ablation")
        elif field.name == "model":
            parser.add_argument(name, required=True, help="local folder or hub id")
        elif field.name == "r":  # torchrun takes --r for an option of its own, cut short
            parser.add_argument("--rank", "--r", dest="r", type=int, default=field.default, help="r; %(default)s")
        else:
            kind, among = kinds[field.type], CHOICES.get(field.name)
            parser.add_argument(name, type=kind, default=field.default, choices=among, help="default: %(default)s")


def _number_or_word(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def from_arguments(arguments) -> Training:
    """The settings that `add_arguments` has read; of those it was `without`, the default."""
    return Training(**{f.name: getattr(arguments, f.name) for f in fields(Training) if hasattr(arguments, f.name)})


def settings_of(settings: Training, **others) -> dict:
    """What goes into the run's JSON: of a model's folder its name alone, of a hub id all of it."""
    is_folder = os.path.isdir(settings.model)
    name = os.path.basename(settings.model.rstrip(os.sep)) if is_folder else settings.model
    return asdict(settings) | others | {"model": name}
