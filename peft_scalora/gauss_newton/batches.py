"""The micro-batches of a step: how their weights reach the optimizer, and their gradients the parameters."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from .linearize import Forward, Loss


class Weight:
    """Weight of a micro-batch's loss, known once `backward` has run."""

    value: float | Tensor = 1.0


@dataclass
class Batch:
    """Micro-batch of the step in progress: its functions, its weight, its losses by step size in a line search."""

    forward: Forward
    loss: Loss
    weight: Weight
    losses: Tensor | None = None


class KnownGradients(torch.autograd.Function):
    """Scalar whose gradients by the parameters have been computed already."""

    @staticmethod
    def forward(ctx, value: Tensor, weight: Weight, *params_and_gradients: Tensor) -> Tensor:
        # Of the batch no more than its weight: `forward` may hold outputs that hold this value, and no collector sees
        # a cycle that goes through the graph.
        ctx.weight = weight
        ctx.params = len(params_and_gradients) // 2
        ctx.save_for_backward(*params_and_gradients[ctx.params :])
        return value.clone()

    @staticmethod
    def backward(ctx, upstream: Tensor):
        ctx.weight.value = upstream.detach()
        return None, None, *(upstream * g for g in ctx.saved_tensors), *[None] * ctx.params


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """Average `tensor` in place over the processes of a distributed training, and return it."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()
    return tensor
