"""What the methods have in common: which layers they adapt, and what they hand to the training loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch import nn
from transformers import TrainerCallback


@dataclass
class Prepared:
    """A model to train, with what Trainer needs besides.

    Attributes:
        arguments: TrainingArguments fields that differ.
        optimizer: class and arguments, instead of Trainer's AdamW.
        effective_rank: rank of the whole weight change, per layer; None where it is no sum of known factors.
    """

    model: nn.Module
    callbacks: list[TrainerCallback] = field(default_factory=list)
    arguments: dict = field(default_factory=dict)
    optimizer: tuple[type[torch.optim.Optimizer], dict] | None = None
    effective_rank: Callable[[nn.Module], dict[str, int]] | None = None


def task_type(model: nn.Module) -> TaskType:
    """Return PEFT's name of what the model is for; of a classifier the head is trained by every method."""
    is_classifier = type(model).__name__.endswith("ForSequenceClassification")
    return TaskType.SEQ_CLS if is_classifier else TaskType.CAUSAL_LM


def common_fields(model: nn.Module, settings) -> dict:
    """Return the fields that every PEFT method has."""
    return {"target_modules": settings.target_modules, "task_type": task_type(model)}


def shared_fields(model: nn.Module, settings) -> dict:
    """Return the fields that LoRA and its relatives have in common."""
    return {"r": settings.r, "lora_alpha": settings.alpha, **common_fields(model, settings)}


def target_layers(model: nn.Module, settings) -> dict[str, nn.Linear]:
    """Return the layers that PEFT adapts with these `target_modules`, by name.

    PEFT itself finds them, in a copy of the model without weights.

    Raises:
        ValueError: there is none, or one is not linear.
    """
    with torch.device("meta"):
        skeleton = get_peft_model(type(model)(model.config), LoraConfig(r=1, **common_fields(model, settings)))
    layers = {name: model.get_submodule(name) for name in skeleton.base_model.targeted_module_names}
    other = [name for name, layer in layers.items() if not isinstance(layer, nn.Linear)]
    if other:
        raise ValueError(
            f"method={settings.method!r} adapts nn.Linear only, and {other[0]} is {type(layers[other[0]]).__name__}: "
            "choose other target_modules."
        )
    return layers


def is_quantized(model: nn.Module) -> bool:
    return getattr(model, "quantization_method", None) is not None


def refuse_quantized(model: nn.Module, settings, reason: str) -> None:
    """Refuse a base that is quantized.

    Raises:
        ValueError: names the method and the reason.
    """
    if is_quantized(model):
        raise ValueError(f"method={settings.method!r} needs a base that is not quantized: {reason}.")
