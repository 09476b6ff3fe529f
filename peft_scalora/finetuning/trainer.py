"""The Trainer that all runs have in common."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import Trainer, TrainingArguments


def build_trainer(
    model, arguments: dict, classifier: bool = False, trainer_class: Callable[..., Trainer] = Trainer, **options
) -> Trainer:
    """Return a Trainer on the GPU if there is one, which reports every loss as it is and to nobody.

    Args:
        arguments: fields of TrainingArguments.
        classifier: the model's loss is a mean over the batch, not over the tokens of all batches of a step.
        options: the other arguments of `trainer_class`.
    """
    common = {
        "logging_nan_inf_filter": False,  # Trainer would show the mean of the losses before
        "report_to": "none",
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    trainer = trainer_class(model=model, args=TrainingArguments(**common | arguments), **options)
    if classifier:
        # Trainer would take its loss for one over all batches of a step, and add them up.
        trainer.model_accepts_loss_kwargs = False
    return trainer
