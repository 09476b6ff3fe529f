"""Distillation: a student of fewer layers learns the logits and the hidden states of the fine-tuned model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer

from . import shrink
from .common import Context, Row, load, save
from .structure import influential_layers
from .structure import misfit as structure_misfit

__all__ = ["ROWS", "build", "load", "misfit"]

TEMPERATURE, SOFT, HIDDEN = 2.0, 0.5, 0.1
ROWS = {
    "distilled": Row(
        "trains every weight of the student, with a forward pass of the teacher beside it",
        options={"part": "layers", "amount": 0.5},
    )
}

misfit = structure_misfit


def build(row: Row, context: Context, folder: str) -> nn.Module:
    teacher = context.base(row)
    batch = context.task.batch(context.task.train[:32])
    kept = influential_layers(teacher, batch, row.options["amount"])
    context.figures["kept_layers"] = kept
    student = shrink.keep_layers(teacher, kept)
    student = context.fine_tune(student, "full", partial(DistillationTrainer, teacher=teacher, kept=kept))
    save(student, folder)
    return student


class DistillationTrainer(Trainer):
    """Trainer whose loss is `distillation_loss` against a teacher, of whose layers the student has `kept`."""

    def __init__(self, *arguments, teacher: nn.Module, kept: Sequence[int], **options):
        super().__init__(*arguments, **options)
        self.teacher, self.kept = teacher.eval().requires_grad_(False).to(self.args.device), kept
        self.model_accepts_loss_kwargs = False  # the loss is a mean over one batch

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        student = model(**inputs, output_hidden_states=True)
        questions = {name: t for name, t in inputs.items() if name != "labels"}
        with torch.no_grad():
            teacher = self.teacher(**questions, output_hidden_states=True)
        teacher_states = [teacher.hidden_states[0], *(teacher.hidden_states[i + 1] for i in self.kept)]
        loss = distillation_loss(
            student.loss,
            learned(student.logits, inputs["labels"]),
            learned(teacher.logits, inputs["labels"]),
            student.hidden_states,
            teacher_states,
            inputs["attention_mask"],
        )
        return (loss, student) if return_outputs else loss


def learned(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the logits (prediction, class) that have labels: a classifier's rows, the answer tokens of a LM."""
    return logits if logits.dim() == 2 else logits[:, :-1][labels[:, 1:] != -100]


def distillation_loss(
    hard: Tensor,
    student_logits: Tensor,
    teacher_logits: Tensor,
    student_states: Sequence[Tensor],
    teacher_states: Sequence[Tensor],
    attention_mask: Tensor,
) -> Tensor:
    """Return (1 - a) hard + a T² KL(teacher_T ‖ student_T) + b mean_l ‖S_l - H_l‖² / ‖H_l‖².

    The soft part is Hinton et al. (arXiv 1503.02531, section 2), the hidden part that of TinyBERT (arXiv 1909.10351,
    eq. 8), relative to the teacher's states, whose size differs from layer to layer. a = SOFT, b = HIDDEN,
    T = TEMPERATURE.

    Args:
        hard: loss against the labels.
        student_logits, teacher_logits: (prediction, class).
        student_states, teacher_states: one (batch, position, hidden) for the embeddings and every layer of the student.
        attention_mask: (batch, position); padding does not count.
    """
    soft = F.kl_div(
        F.log_softmax(student_logits / TEMPERATURE, -1),
        F.log_softmax(teacher_logits / TEMPERATURE, -1),
        reduction="batchmean",
        log_target=True,
    )
    real = attention_mask.bool()
    hidden = [
        (S[real] - H[real]).square().sum() / H[real].square().sum() for S, H in zip(student_states, teacher_states)
    ]
    return (1 - SOFT) * hard + SOFT * TEMPERATURE**2 * soft + HIDDEN * torch.stack(hidden).mean()
