"""Bytes of generated English, to train small models on from nothing and to evaluate them on."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peft_scalora.finetuning.corpus import generate


def byte_stream(size: int, seed: int) -> Tensor:
    """Return the acceptable ones of `size` generated sentences, as one stream of bytes."""
    text = " ".join(row["sentence"] for row in generate("train", size, seed) if row["label"])
    return torch.tensor(list(text.encode()))


def windows(stream: Tensor, length: int, count: int, generator: torch.Generator) -> Tensor:
    """Return `count` pieces of the stream that start anywhere, (count, length)."""
    starts = torch.randint(0, len(stream) - length, (count,), generator=generator)
    return stream[starts[:, None] + torch.arange(length)]


def in_rows(stream: Tensor, length: int, count: int) -> Tensor:
    """Return the stream's start, cut into `count` rows of `length`, or as many as there are."""
    count = min(count, len(stream) // length)
    return stream[: count * length].view(count, length)


@torch.no_grad()
def held_out_loss(model: nn.Module, rows: Tensor) -> float:
    """Return the mean loss of a causal language model on rows of token ids, in nats a token."""
    was_training = model.training
    model.eval()
    loss = model(input_ids=rows, labels=rows).loss.item()
    model.train(was_training)
    return loss
