"""Score runs of the frontier study; the schedule of the learning rate that they have in common.

Suffixes: S runs, N rows of a run, T bytes of a row, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .frontier_runs import Run

IGNORED = -100


def cosine(step: int, steps: int) -> float:
    """Return the factor of the learning rate: from 1 to 0, half a period of a cosine."""
    return (1 + math.cos(math.pi * step / steps)) / 2


class Scored:
    """Runs whose logits can be had, and with them their losses."""

    runs: Sequence[Run]

    def logits(self, ids_SNT: Tensor) -> Tensor:
        """Return (S, N, T, V); the rows of a run may be those of all."""
        raise NotImplementedError

    def losses(self, ids_SNT: Tensor, labels_SNT: Tensor) -> Tensor:
        """Return the mean loss of the predicted bytes of each run (S)."""
        logits = self.logits(ids_SNT)[:, :, :-1]
        labels = labels_SNT[:, :, 1:].expand(logits.shape[:-1])
        losses = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none", ignore_index=IGNORED)
        return losses.view(len(self.runs), -1).sum(1) / (labels != IGNORED).flatten(1).sum(1)

    @torch.no_grad()
    def held_out_losses(self, ids_NT: Tensor, labels_NT: Tensor) -> list[float]:
        """Return the mean loss of each run on the same rows."""
        parts = [self.losses(ids[None], labels[None]) for ids, labels in zip(ids_NT.split(32), labels_NT.split(32))]
        return torch.stack(parts).mean(0).tolist()

    def scores(self, task, base_rows_NT: Tensor) -> list[dict]:
        """Return the task's scores of every run, and its loss on the base model's own text."""
        forgotten = self.held_out_losses(base_rows_NT, base_rows_NT)
        return [{**score, "base_loss": loss} for score, loss in zip(task.score(self), forgotten)]
