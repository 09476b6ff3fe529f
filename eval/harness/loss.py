"""The loss of answers that are given, row by row: what can be measured of any model, however small."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from peft_scalora.data import IGNORED_LABEL

from .ranks import over_ranks
from .record import is_main_process


def answer_loss(model: torch.nn.Module, rows: Sequence[dict[str, list[int]]], batch_size: int = 16) -> list[float]:
    """Mean negative log-likelihood, in nats, of the labelled tokens of every row, as `prompts.encode` makes them.

    Every process has to call it with the same rows. Logits are read in float32.
    """

    def share(rows: Sequence[dict]) -> list[float]:
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]), reverse=True)
        losses = [0.0] * len(rows)
        with tqdm(total=len(rows), desc="loss", unit="row", leave=False, disable=not is_main_process()) as progress:
            for start in range(0, len(order), batch_size):
                batch = order[start : start + batch_size]
                for i, loss in zip(batch, _batch_loss(model, [rows[i] for i in batch])):
                    losses[i] = loss
                progress.update(len(batch))
        return losses

    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return over_ranks(share, rows)
    finally:
        model.train(was_training)


def _batch_loss(model: torch.nn.Module, rows: list[dict]) -> list[float]:
    def padded(name: str, value: int) -> torch.Tensor:
        sequences = [torch.tensor(row[name]) for row in rows]
        return pad_sequence(sequences, batch_first=True, padding_value=value).to(model.device)

    logits = model(input_ids=padded("input_ids", 0), attention_mask=padded("attention_mask", 0)).logits
    losses = []
    for row_logits, labels in zip(logits[:, :-1], padded("labels", IGNORED_LABEL)[:, 1:]):
        answer = labels != IGNORED_LABEL
        losses.append(cross_entropy(row_logits[answer].float(), labels[answer]))
    return torch.stack(losses).tolist()
