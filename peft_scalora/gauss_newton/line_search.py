"""Step sizes along δ and the choice among them (arXiv 2510.09378), as functions of numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence


def step_sizes(points: int) -> list[float]:
    """Return the step sizes to try: α = 2^(-i/2) for i < points, and 0, which rejects the step."""
    return [2 ** (-i / 2) for i in range(points)] + [0.0]


def best_step_size(alphas: Sequence[float], losses: Sequence[float]) -> float:
    """Return the α of the smallest finite loss, the largest of equals; 0 if no loss is below that of α = 0."""
    finite = [(loss, -alpha) for alpha, loss in zip(alphas, losses) if math.isfinite(loss)]
    current = losses[list(alphas).index(0.0)]
    loss, alpha = min(finite, default=(current, 0.0))
    return -alpha if loss < current or not math.isfinite(current) else 0.0
