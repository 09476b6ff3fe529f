"""One fine-tuning run: LoRA or ScaLoRA, classification or causal language modelling. Needs the extra `finetune`."""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from dataclasses import asdict

import torch
from peft import LoraConfig, get_peft_model
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND as ALL_LINEAR
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from .._seams import SEQ_CLS_HEAD_NAMES
from ..callbacks import ScaLoRACallback
from ..config import ScaLoRAConfig
from ..files.atomic import replace_file
from ..files.checkpoints import METRICS_NAME, last_complete_checkpoint
from ..files.fingerprint import fingerprint
from ..plots import plot_lines
from ..rank import effective_rank
from .data import Fields, check_labels, check_rows, encode, find_classes, find_fields, hold_out, load_rows
from .settings import FinetuneSettings, claim_output, finished_metrics


class NonFiniteLoss(RuntimeError):
    """Training stopped because the loss is nan or infinite; the last checkpoint is in the output folder."""


class _StopOnNonFiniteLoss(TrainerCallback):
    def on_log(self, args, state, control, logs=None, **kwargs):
        loss = (logs or {}).get("loss", 0.0)
        if not math.isfinite(float(loss)):
            raise NonFiniteLoss(
                f"loss={loss} at step {state.global_step} with learning_rate={args.learning_rate}: lower it, or add "
                f"warmup. The checkpoints below {args.output_dir} are as they were saved."
            )


class _StepTimes(TrainerCallback):
    """Duration of every optimizer step: a median is a fairer figure than a mean on a busy machine."""

    def __init__(self):
        self.seconds: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self._started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.perf_counter() - self._started)


def adapter_config(settings: FinetuneSettings, modules_to_save: list[str] | None = None) -> LoraConfig:
    """The PEFT configuration of the run's method; LoRA and ScaLoRA get the same fields."""
    shared = {
        "r": settings.r,
        "lora_alpha": settings.lora_alpha,
        "lora_dropout": settings.lora_dropout,
        "target_modules": _target_names(settings) or ALL_LINEAR,
        "modules_to_save": modules_to_save,
        "task_type": "SEQ_CLS" if settings.task == "classification" else "CAUSAL_LM",
    }
    if settings.method == "lora":
        return LoraConfig(**shared)
    return ScaLoRAConfig(
        **shared,
        scaling=settings.scaling,
        scaling_interval=settings.scaling_interval,
        smoothness=settings.smoothness,
        accumulator_rank=settings.accumulator_rank,
    )


def classification_metrics(prediction) -> dict[str, float]:
    """Accuracy and Matthews correlation (classes), or Pearson correlation (one real value)."""
    scores, labels = prediction
    if scores.shape[-1] == 1:
        from scipy.stats import pearsonr

        return {"pearson": float(pearsonr(scores[:, 0], labels).statistic)}
    from sklearn.metrics import accuracy_score, matthews_corrcoef

    guesses = scores.argmax(-1)
    return {"accuracy": accuracy_score(labels, guesses), "matthews": matthews_corrcoef(labels, guesses)}


def finetune(settings: FinetuneSettings) -> dict:
    """Run, or continue, the fine-tuning and return its metrics; everything lands below `settings.output`.

    Writes settings.json, the adapter with its model card, metrics.json, loss.png and scalora_rank.png. An interrupted
    run continues from its last checkpoint; a finished one returns its metrics.

    Raises:
        OSError: the output folder cannot be written to. ValueError: data or settings do not fit, or the folder holds
            a run with other settings or another base model. NonFiniteLoss: training diverged.
    """
    finished = finished_metrics(settings)
    if finished is not None:
        return finished
    claim_output(settings)  # before hours of training whose result could not be saved
    set_seed(settings.seed)
    (train_rows, eval_rows, test_rows), tokenizer, model, classes = _prepare(settings)
    claim_output(settings, fingerprint(model, model.peft_config["default"].modules_to_save))
    trainer = _build_trainer(settings, model, tokenizer, train_rows, eval_rows)
    times = _StepTimes()
    trainer.add_callback(times)
    started = time.perf_counter()
    result = trainer.train(resume_from_checkpoint=last_complete_checkpoint(settings.output))
    seconds = time.perf_counter() - started

    trainer.save_model(settings.output)
    tokenizer.save_pretrained(settings.output)
    metrics = {"train_loss": result.training_loss, "train_seconds": seconds, **trainer.evaluate()}
    if test_rows is not None:
        metrics |= trainer.evaluate(test_rows, metric_key_prefix="test")
    metrics |= _model_metrics(model, settings.output)
    metrics["median_seconds_per_step"] = statistics.median(times.seconds) if times.seconds else None
    metrics["steps"] = trainer.state.global_step
    metrics["labels"] = classes
    metrics["settings"] = asdict(settings)
    metrics["log"] = trainer.state.log_history
    _plot_loss(os.path.join(settings.output, "loss.png"), trainer.state.log_history)
    replace_file(os.path.join(settings.output, METRICS_NAME), json.dumps(metrics, indent=1, default=str))
    return metrics


def make_trainer(settings: FinetuneSettings) -> Trainer:
    """The Trainer of a run with fresh weights, for searches: it logs nothing of its own and does not stop by itself."""
    set_seed(settings.seed)
    (train_rows, eval_rows, _), tokenizer, model, _ = _prepare(settings)
    trainer = _build_trainer(settings, model, tokenizer, train_rows, eval_rows)
    trainer.remove_callback(_StopOnNonFiniteLoss)
    trainer.remove_callback(ScaLoRACallback)
    return trainer


def _prepare(settings: FinetuneSettings):
    """The encoded rows to train, evaluate and test on, the tokenizer, the model and the classes it tells apart."""
    parts, fields, classes = _load_data(settings)
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = _adapted_model(settings, classes)
    if settings.task == "classification":
        model.config.pad_token_id = tokenizer.pad_token_id
    parts = [part and encode(part, tokenizer, settings.task, fields, settings.max_length, classes) for part in parts]
    return parts, tokenizer, model, classes


def _load_data(settings: FinetuneSettings) -> tuple[list, Fields, list | None]:
    """Checked rows to train, evaluate and, or None, test on; their fields; the classes of the labels."""
    rows = load_rows(settings.data)
    given = Fields(settings.text_fields, settings.label_field, settings.prompt_field, settings.completion_field)
    fields = find_fields(rows.column_names, settings.task, given)
    check_rows(rows, fields, settings.data)
    classes = find_classes(rows, fields.label, settings.data) if fields.label else None

    def others(source: str, split: str):
        found = load_rows(source, split)
        check_rows(found, fields, source)
        if fields.label:
            check_labels(found, fields.label, classes, source)
        return found

    if settings.eval_data:
        eval_rows = others(settings.eval_data, "validation")
    else:
        rows, eval_rows = hold_out(rows, settings.eval_rows, settings.data)
    eval_rows = eval_rows.select(range(min(settings.eval_rows, len(eval_rows))))
    test_rows = others(settings.test_data, "test") if settings.test_data else None
    return [rows, eval_rows, test_rows], fields, classes


def _adapted_model(settings: FinetuneSettings, classes: list | None):
    model, loading = _load_model(settings, classes)
    names = [name for name, _ in model.named_modules() if name]
    for target in _target_names(settings):
        if not any(f".{name}".endswith(f".{target}") for name in names):
            raise ValueError(
                f"target_modules={settings.target_modules!r}: {settings.model!r} has no module named {target}. Name "
                f"modules it has, comma-separated, or {ALL_LINEAR}."
            )
    fresh = _fresh_modules(model, loading["missing_keys"], settings.model)
    # PEFT saves these heads by itself, with every module whose name ends so, and would adapt the latter besides.
    heads = SEQ_CLS_HEAD_NAMES if settings.task == "classification" else []
    whole = fresh | {name for name in names if name.endswith(tuple(heads))}
    outermost = {name for name in whole if not any(name.startswith(f"{other}.") for other in whole)}
    return get_peft_model(model, adapter_config(settings, sorted(outermost - set(heads)) or None))


def _target_names(settings: FinetuneSettings) -> list[str]:
    """The names given; empty for all linear modules."""
    if settings.target_modules == ALL_LINEAR:
        return []
    return [name.strip() for name in settings.target_modules.split(",")]


def _fresh_modules(model, missing_keys: set[str], source: str) -> set[str]:
    """Modules that the base model's files lack: random at every load, so they are trained and saved whole."""
    fresh = {name.rpartition(".")[0] for name, _ in model.named_parameters() if name in missing_keys}
    for name in fresh:
        if any(True for _ in model.get_submodule(name).children()):
            raise ValueError(
                f"model={source!r} lacks a weight of {name or type(model).__name__}, which would be random at every "
                "load and cannot be saved with the adapter: complete the model first."
            )
    return fresh


def _load_model(settings: FinetuneSettings, classes: list | None) -> tuple:
    """The base model and which of its weights its files lack."""
    if settings.task == "causal-lm":
        auto, options = AutoModelForCausalLM, {"dtype": torch.bfloat16 if settings.bf16 else torch.float32}
    elif classes is None:
        auto, options = AutoModelForSequenceClassification, {"num_labels": 1}
    else:
        names = [str(value) for value in classes]
        numbers = {name: number for number, name in enumerate(names)}
        auto, options = AutoModelForSequenceClassification, {"id2label": dict(enumerate(names)), "label2id": numbers}
    return auto.from_pretrained(settings.model, output_loading_info=True, **options)


def _build_trainer(settings: FinetuneSettings, model, tokenizer, train_rows, eval_rows) -> Trainer:
    classification = settings.task == "classification"
    arguments = TrainingArguments(
        output_dir=settings.output,
        learning_rate=settings.learning_rate,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps,
        warmup_steps=settings.warmup_ratio,
        weight_decay=settings.weight_decay,
        logging_steps=settings.logging_steps,
        logging_nan_inf_filter=False,  # Trainer would show the mean of the losses before
        save_steps=settings.save_steps,
        save_total_limit=2,
        report_to="none",
        seed=settings.seed,
        bf16=settings.bf16,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    collator = DataCollatorWithPadding(tokenizer) if classification else DataCollatorForSeq2Seq(tokenizer)
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        data_collator=collator,
        compute_metrics=classification_metrics if classification else None,
        callbacks=[_StopOnNonFiniteLoss()],
    )
    if classification:
        # Its loss is a mean over the batch: Trainer would take it for one over all batches of a step, and add them up.
        trainer.model_accepts_loss_kwargs = False
    trainer.add_callback(ScaLoRACallback(trainer))  # the rank of a LoRA adapter is worth seeing too
    return trainer


def _model_metrics(model, folder: str) -> dict:
    ranks = effective_rank(model)
    return {
        "effective_rank": sum(ranks.values()) / len(ranks),
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "checkpoint_bytes": os.path.getsize(os.path.join(folder, "adapter_model.safetensors")),
    }


def _plot_loss(path: str, log: list[dict]) -> None:
    points = [(entry["step"], entry["loss"]) for entry in log if "loss" in entry]
    if points:
        plot_lines(path, [("Training loss", "loss", {"training": tuple(zip(*points))})])
