"""MoRA (arXiv 2405.12130): a square matrix M (r̂ x r̂) between a compression of the input and a decompression.

ΔW x = f_decomp(M f_comp(x)), r̂ = ⌊√((m + n) r)⌋: as many parameters as LoRA of rank r has, at rank up to r̂ and above.
f_comp and f_decomp have no parameters:

- rotation (Eq. 9), for small ranks: x is cut into blocks of r̂ numbers, block j is rotated as RoPE rotates position j,
  M is applied to every block, and the results are put one after the other. r̂ is rounded down to an even number.
- sharing (Eq. 6), for large ranks: x_i of all i with the same i mod r̂ are added, and the output is repeated.

As in the authors' code, x is filled up to whole blocks with its own beginning, and an output that is too long or too
short is cut off or repeated. Shapes: base weight (m x n) = (out, in).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .shared import Prepared, refuse_quantized, target_layers, task_type

# The authors rotate at small ranks (r = 8) and share at large ones; their pre-training has r = 128.
SHARING_FROM_RANK = 128
HEADS = ("classifier", "score")  # of a classifier, as in PEFT


def blocks(x: Tensor, size: int) -> Tensor:
    """Return x (..., n) as (..., ⌈n / size⌉, size), filled up with the beginning of x."""
    padding = -x.shape[-1] % size
    return torch.cat([x, x[..., :padding]], dim=-1).unflatten(-1, (-1, size))


def rotated(x: Tensor) -> Tensor:
    """Rotate block j of x (..., blocks, size) by RoPE's angles j θ_i, θ_i = 10000^(-2i / size)."""
    count, size = x.shape[-2:]
    frequencies = 10000.0 ** (-torch.arange(0, size, 2, dtype=torch.float64, device=x.device) / size)
    angles = torch.outer(torch.arange(count, dtype=torch.float64, device=x.device), frequencies)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def to_length(y: Tensor, length: int) -> Tensor:
    """Repeat y (..., k), and cut it off to (..., length)."""
    return y.repeat(*[1] * (y.dim() - 1), -(-length // y.shape[-1]))[..., :length]


def rotation(x: Tensor, M: Tensor, out_features: int) -> Tensor:
    """Return ΔW x by Eq. 9."""
    return to_length(F.linear(rotated(blocks(x, M.shape[0])), M).flatten(-2), out_features)


def sharing(x: Tensor, M: Tensor, out_features: int) -> Tensor:
    """Return ΔW x by Eq. 6."""
    return to_length(F.linear(blocks(x, M.shape[0]).sum(-2), M), out_features)


class MoRALinear(nn.Module):
    """A frozen linear layer with M beside it, float32, zero at first.

    Raises:
        ValueError: r̂ is larger than the layer.
    """

    def __init__(self, base_layer: nn.Linear, r: int):
        super().__init__()
        self.base_layer = base_layer
        self.change = sharing if r >= SHARING_FROM_RANK else rotation
        m, n = base_layer.out_features, base_layer.in_features
        size = math.isqrt((m + n) * r)
        size -= size % 2 if self.change is rotation else 0
        if not 2 <= size <= min(m, n):
            raise ValueError(f"r={r} makes MoRA's matrix {size} x {size}, for a layer of {m} x {n}: choose another r.")
        self.mora_M = nn.Parameter(torch.zeros(size, size, device=base_layer.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        result = self.base_layer(x)
        return result + self.change(x.to(self.mora_M.dtype), self.mora_M, result.shape[-1]).to(result.dtype)

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """Return ΔW (m x n): the change of every unit vector."""
        unit = torch.eye(self.base_layer.in_features, dtype=self.mora_M.dtype, device=self.mora_M.device)
        return self.change(unit, self.mora_M, self.base_layer.out_features).T


def effective_rank(model: nn.Module, tol: float = 0.01) -> dict[str, int]:
    """Return how many singular values of each layer's change are above `tol` times the largest."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MoRALinear)}
    return {name: int(_rank(layer.delta_weight(), tol)) for name, layer in layers.items()}


def _rank(weight: Tensor, tol: float) -> Tensor:
    singular = torch.linalg.svdvals(weight)
    return (singular > tol * singular[0]).sum()


def mora(model, settings, batches) -> Prepared:
    """Freeze the base and wrap the targets; a classifier's head is trained, as PEFT does."""
    refuse_quantized(model, settings, "there is no variant of it for one")
    layers = target_layers(model, settings)
    model.requires_grad_(False)
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, MoRALinear(layer, settings.r))
    if task_type(model) == "SEQ_CLS":
        for head in HEADS:
            if hasattr(model, head):
                getattr(model, head).requires_grad_(True)
    return Prepared(model, effective_rank=effective_rank)
