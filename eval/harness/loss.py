"""The loss of answers that are given, row by row: what can be measured of any model, however small."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from peft_scalora.finetuning.prompts import IGNORED_LABEL

from .likelihood import log_likelihoods
from .ranks import over_ranks


def answer_loss(
    model: torch.nn.Module, rows: Sequence[dict[str, list[int]]], batch_size: int = 16, description: str = "loss"
) -> list[float]:
    """Return every row's mean loss of the answer's tokens, in nats; rows as `prompts.with_labels` makes them.

    Every process has to call it with the same rows.
    """
    pairs = []
    for row in rows:
        start = row["labels"].count(IGNORED_LABEL)
        pairs.append((row["input_ids"][:start], row["input_ids"][start:]))
    was_training = model.training
    model.eval()
    try:
        values = over_ranks(lambda share: log_likelihoods(model, share, batch_size, description), pairs)
    finally:
        model.train(was_training)
    return [-value / len(answer) for value, (_, answer) in zip(values, pairs, strict=True)]
