"""What one rescaling did, kept as tensors on the device until somebody reads a figure."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..maths.scaling import Scales


@dataclass(frozen=True)
class FoldGrams:
    """Gram matrices PᵀP and QᵀQ of P = [A, Ã, U] and Q = [B, B̃, Vᵀ], for a fold U V of s A Bᵀ - s Ã B̃ᵀ."""

    gram_P_LKK: Tensor
    gram_Q_LKK: Tensor
    R: int
    s: float
    skipped_L: Tensor

    def error(self) -> float:
        """Largest ‖A Bᵀ - Ã B̃ᵀ - U V / s‖_F / ‖A Bᵀ‖_F of a layer that was scaled; its own floor is 1e-8."""
        K = self.gram_P_LKK.shape[-1]
        signs_K = torch.tensor([1.0] * self.R + [-1.0] * self.R + [-1 / self.s] * (K - 2 * self.R), dtype=torch.float64)
        products_LKK = (self.gram_P_LKK * self.gram_Q_LKK).cpu() * signs_K[:, None] * signs_K
        whole_L = products_LKK[:, : self.R, : self.R].sum((-2, -1))
        error_L = (products_LKK.sum((-2, -1)).clamp(min=0) / whole_L).sqrt()
        return float(torch.where((whole_L == 0) | self.skipped_L.cpu(), 0, error_L).max())


@dataclass(repr=False)
class RescaleReport:
    """What a rescaling did. Reading a figure waits for the device; keeping the report does not.

    Attributes:
        layers: layers that were due.
        column, scalar, exact, skipped: how many of them were scaled by Theorem 5, by Theorem 3, by the non-negative
            problem, or not at all (no gradient, a zero one, or one that is not finite).
        median_log_alpha: median of |log α| over all columns of the layers that were scaled.
        fold_error: largest ‖s A Bᵀ - s Ã B̃ᵀ - fold‖_F / ‖s A Bᵀ‖_F of a layer: what rounding did to its function.
        discarded: Frobenius norm, over all layers, of what recompression to rank R left out.
    """

    without_gradient: int = 0
    scales: list[tuple[str, Scales]] = field(default_factory=list)
    folds: list[FoldGrams] = field(default_factory=list)
    discarded_norms: list[Tensor] = field(default_factory=list)

    def _count(self, name: str) -> int:
        """Layers scaled by the rule `name`."""
        total = 0
        for scaling, scales in self.scales:
            by_rule = ~scales.skipped_L
            if scaling != "exact":
                by_rule = by_rule & (scales.by_column_L if name == "column" else ~scales.by_column_L)
            total += int(by_rule.sum()) if (scaling == "exact") == (name == "exact") else 0
        return total

    layers = property(lambda self: self.without_gradient + sum(len(s.skipped_L) for _, s in self.scales))
    column = property(lambda self: self._count("column"))
    scalar = property(lambda self: self._count("scalar"))
    exact = property(lambda self: self._count("exact"))
    skipped = property(lambda self: self.without_gradient + sum(int(s.skipped_L.sum()) for _, s in self.scales))
    fold_error = property(lambda self: max((fold.error() for fold in self.folds), default=0.0))
    discarded = property(lambda self: sum(float(d.square().sum()) for d in self.discarded_norms) ** 0.5)

    @property
    def median_log_alpha(self) -> float:
        logs = [s.alpha_LR[~s.skipped_L].log().abs().flatten().cpu() for _, s in self.scales]
        logs = torch.cat(logs) if logs else torch.zeros(0)
        return float(logs.quantile(0.5)) if len(logs) else 0.0

    def __repr__(self) -> str:
        names = ("layers", "column", "scalar", "exact", "skipped")
        counts = ", ".join(f"{name}={getattr(self, name)}" for name in names)
        errors = f"fold_error={self.fold_error:.2g}, discarded={self.discarded:.2g}"
        return f"RescaleReport({counts}, median_log_alpha={self.median_log_alpha:.3g}, {errors})"
