"""Steps of an inner loop on δ: of an optimizer, or conjugate gradients on the quadratic model."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Tensors = dict[str, Tensor]


def inner_rate(schedule: str, position: int, inner_steps: int) -> float:
    """Factor of the learning rate at inner step `position` (from 0): 1, or a cosine from 1 towards 0."""
    return 1.0 if schedule == "constant" else 0.5 * (1 + math.cos(math.pi * position / inner_steps))


def make_inner_optimizers(
    delta: Tensors, muon: set[str], betas: tuple[float, float], eps: float
) -> list[torch.optim.Optimizer]:
    """Make Muon for the matrices named in `muon` and AdamW for the rest; both step δ itself.

    Their rate is set at each step. Neither decays δ: weight decay acts on θ + δ.
    """
    matrices = [d for name, d in delta.items() if name in muon]
    others = [d for name, d in delta.items() if name not in muon]
    optimizers = []
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, weight_decay=0.0))
    if others:
        optimizers.append(torch.optim.AdamW(others, betas=betas, eps=eps, weight_decay=0.0))
    return optimizers


def conjugate_gradient(
    product: Callable[[Tensors], Tensors], gradient: Tensors, damping: float, iterations: int
) -> tuple[Tensors, float]:
    """Solve (G + λI) s = -gradient from s = 0, and return s with the decrease -⟨gradient, s⟩ - ½⟨s, G s⟩.

    Args:
        product: v -> G v with G symmetric and positive semidefinite.
        damping: λ ≥ 0.
        iterations: at most so many products; stops early where the residual is down to rounding.
    """
    s = {name: torch.zeros_like(g) for name, g in gradient.items()}
    r = {name: -g for name, g in gradient.items()}
    p, rr = dict(r), inner_product(r, r)
    floor = rr * torch.finfo(next(iter(r.values())).dtype).eps ** 2
    for _ in range(iterations):
        if rr <= floor:
            break
        Gp = product(p)
        curvature = inner_product(p, Gp) + damping * inner_product(p, p)
        if not curvature > 0:  # flat along p, up to rounding: the model has no minimum there
            break
        step = rr / curvature
        s = {name: s[name] + step * p[name] for name in s}
        r = {name: r[name] - step * (Gp[name] + damping * p[name]) for name in r}
        rr, previous = inner_product(r, r), rr
        p = {name: r[name] + (rr / previous) * p[name] for name in p}
    # G s = -gradient - r - λ s, so the decrease needs no further product.
    decrease = -0.5 * inner_product(gradient, s) + 0.5 * inner_product(r, s) + 0.5 * damping * inner_product(s, s)
    return s, decrease


def inner_product(a: Tensors, b: Tensors) -> float:
    """Return ⟨a, b⟩ summed over all tensors, in float64."""
    return float(sum((a[name].double() * b[name].double()).sum() for name in a))


def adapt_damping(damping: float, actual: float, predicted: float) -> float:
    """Return the damping by Levenberg-Marquardt's rule.

    It rises by half where the loss fell by less than a quarter of the predicted decrease. It falls by a third where
    the loss fell by more than three quarters of it.
    """
    ratio = actual / predicted if predicted > 0 else 0.0
    if not ratio >= 0.25:  # nan too
        return damping * 1.5
    return damping / 1.5 if ratio > 0.75 else damping
