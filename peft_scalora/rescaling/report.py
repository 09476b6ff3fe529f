"""Report one rescaling, kept as tensors on the device until somebody reads a figure."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..maths.scaling import SCALINGS, Scales


@dataclass(frozen=True)
class FoldGrams:
    """Gram matrices PᵀP and Q Qᵀ of P = [left, new left, U] and Q = [right; new right; V], for a fold U V."""

    gram_P_LKK: Tensor
    gram_Q_LKK: Tensor
    r: int
    s: float
    skipped_L: Tensor

    def error(self) -> float:
        """Return the largest ‖s left right - s new_left new_right - U V‖_F / ‖s left right‖_F of a scaled layer.

        Its own floor is 1e-8.
        """
        r = self.r
        K = self.gram_P_LKK.shape[-1]
        signs_K = torch.tensor([1.0] * r + [-1.0] * r + [-1 / self.s] * (K - 2 * r), dtype=torch.float64)
        products_LKK = (self.gram_P_LKK * self.gram_Q_LKK).cpu() * signs_K[:, None] * signs_K
        whole_L = products_LKK[:, :r, :r].sum((-2, -1))
        error_L = (products_LKK.sum((-2, -1)).clamp(min=0) / whole_L).sqrt()
        return float(torch.where((whole_L == 0) | self.skipped_L.cpu(), 0, error_L).max())


@dataclass(repr=False)
class RescaleReport:
    """Report of one rescaling: its scales, its folds and the norms that it discarded.

    Reading a figure waits for the device; keeping the report does not.

    Attributes:
        layers: layers that were due.
        counts: how many of them were scaled how, by the labels of the rules in `SCALINGS`, and how many were "skipped":
            layers without a gradient, with a zero one, or with one that is not finite.
        column, scalar, exact, skipped: the counts of these labels. Theorem 5, Theorem 3 and the non-negative problem.
        median_log_alpha: median of |log α| over all columns of the layers that were scaled.
        fold_error: largest ‖s A Bᵀ - s Ã B̃ᵀ - fold‖_F / ‖s A Bᵀ‖_F of a layer (the paper's A and B): the change of its
            function by rounding.
        discarded: Frobenius norm, over all layers, of the parts that recompressions left out.
    """

    without_gradient: int = 0
    scales: list[Scales] = field(default_factory=list)
    folds: list[FoldGrams] = field(default_factory=list)
    discarded_norms: list[Tensor] = field(default_factory=list)

    layers = property(lambda self: self.without_gradient + sum(len(s.skipped_L) for s in self.scales))
    column = property(lambda self: self.counts["column"])
    scalar = property(lambda self: self.counts["scalar"])
    exact = property(lambda self: self.counts["exact"])
    skipped = property(lambda self: self.counts["skipped"])
    fold_error = property(lambda self: max((fold.error() for fold in self.folds), default=0.0))
    discarded = property(lambda self: sum(float(d.square().sum()) for d in self.discarded_norms) ** 0.5)

    @property
    def counts(self) -> Counter[str]:
        """Count layers by the label of how they were scaled."""
        counts = Counter(dict.fromkeys(SCALINGS, 0) | {"skipped": self.without_gradient})
        for scales in self.scales:
            counts["skipped"] += int(scales.skipped_L.sum())
            for label, mask_L in scales.scaled_by.items():
                counts[label] += int(mask_L.sum())
        return counts

    @property
    def median_log_alpha(self) -> float:
        logs = [s.alpha_Lr[~s.skipped_L].log().abs().flatten().cpu() for s in self.scales]
        logs = torch.cat(logs) if logs else torch.zeros(0)
        return float(logs.quantile(0.5)) if len(logs) else 0.0

    def __repr__(self) -> str:
        counts = ", ".join(f"{label}={count}" for label, count in self.counts.items())
        errors = f"fold_error={self.fold_error:.2g}, discarded={self.discarded:.2g}"
        return f"RescaleReport(layers={self.layers}, {counts}, median_log_alpha={self.median_log_alpha:.3g}, {errors})"
