"""Every method that can be trained by `--method NAME`, made ready from a plain model.

A method is a function (model, settings, batches) -> Prepared; `METHODS` is the one list of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from peft import LoraConfig, TaskType, get_peft_model
from transformers import TrainerCallback

from peft_scalora import ScaLoRAConfig


@dataclass
class Prepared:
    """A model to train, with what Trainer needs besides: callbacks, and TrainingArguments fields that differ."""

    model: torch.nn.Module
    callbacks: list[TrainerCallback] = field(default_factory=list)
    arguments: dict = field(default_factory=dict)


def task_type(model: torch.nn.Module) -> TaskType:
    """PEFT's name of what the model is for; of a classifier the head is trained by every method."""
    return TaskType.SEQ_CLS if hasattr(model.config, "num_labels") and _is_classifier(model) else TaskType.CAUSAL_LM


def _is_classifier(model: torch.nn.Module) -> bool:
    return type(model).__name__.endswith("ForSequenceClassification")


def shared_fields(model: torch.nn.Module, settings) -> dict:
    """The fields that LoRA and its relatives have in common."""
    return {
        "r": settings.r,
        "lora_alpha": settings.alpha,
        "target_modules": settings.target_modules,
        "task_type": task_type(model),
    }


def full(model, settings, batches) -> Prepared:
    return Prepared(model)


def lora(model, settings, batches) -> Prepared:
    return Prepared(get_peft_model(model, LoraConfig(**shared_fields(model, settings))))


def scalora(model, settings, batches) -> Prepared:
    config = ScaLoRAConfig(
        **shared_fields(model, settings),
        scaling=settings.scaling,
        scaling_interval=settings.scaling_interval,
        smoothness=settings.smoothness,
        accumulator_rank=settings.accumulator_rank,
    )
    return Prepared(get_peft_model(model, config))


METHODS: dict[str, Callable] = {"full": full, "lora": lora, "scalora": scalora}


def prepare(model: torch.nn.Module, settings, batches: Sequence[dict]) -> Prepared:
    """`model` made ready to be trained by `settings.method`; `batches` are a few rows, for inits that see data.

    Raises:
        ValueError: no such method, or one that does not fit the model.
    """
    if settings.method not in METHODS:
        raise ValueError(f"method={settings.method!r} must be one of {', '.join(METHODS)}.")
    return METHODS[settings.method](model, settings, batches)
