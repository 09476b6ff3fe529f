"""Adapters of one shape, rescaled with one set of kernels whatever their number.

Nothing here waits for the accelerator: decisions that depend on a tensor's values are masks. What is small, (2R x 2R)
and (K x K), is computed for all groups at once. Shape suffixes as in scaling.py and accumulator.py.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..accumulator import Accumulator
from ..layer import ScaLoRALayer
from ..maths.accumulator import fold_factors, rounded_fold_factors, truncation
from ..maths.scaling import SCALINGS, column_scales, gram_matrices
from .moments import OptimizerState, carried_scales, carry
from .report import FoldGrams, RescaleReport

# Float64 numbers that one recompression may hold at a time (256 MiB), so that many layers do not add up to a weight.
_WORKSPACE = 2**25
# A recompression leaves up to this part of the R columns free, for whole folds that need none.
_FREE_PART = 1 / 8


@dataclass(frozen=True)
class Target:
    """One adapter in one layer, with the learning rates of its factors."""

    layer: ScaLoRALayer
    adapter: str
    lora_B: nn.Parameter
    lora_A: nn.Parameter
    lr_B: float | Tensor | None
    lr_A: float | Tensor | None

    def group_key(self, optimizer: OptimizerState) -> tuple:
        """Targets with equal keys are rescaled as one batch."""
        layer, adapter, config = self.layer, self.adapter, self.layer.scalora_config[self.adapter]
        accumulator = self.accumulator
        held = type(accumulator), accumulator.shape, accumulator.capacity, accumulator.columns
        factors = (self.lora_B.shape, self.lora_A.shape, self.lora_B.dtype, self.lora_A.dtype, self.lora_B.device)
        states = [tuple(optimizer.carried(factor)) for factor in (self.lora_B, self.lora_A)]
        return *factors, *held, *states, config.scaling, layer.initial_scaling(adapter), self.squared_norms()

    @property
    def accumulator(self) -> Accumulator:
        return self.layer.accumulator(self.adapter)

    def rescaled_tensors(self) -> dict[str, Tensor]:
        return self.accumulator.tensors | {"lora_B": self.lora_B, "lora_A": self.lora_A}

    def squared_norms(self) -> tuple[float, float] | None:
        """Return the configured 1 / (L η s²) for α and for β, None where the rule's own is meant.

        Paper A is stepped with lora_B's rate, and α scales the gradient of lora_A: α belongs to lora_A's rate.
        """
        config = self.layer.scalora_config[self.adapter]
        if config.column_norm2 is not None:
            return config.column_norm2, config.column_norm2
        smoothness = config.smoothness
        if smoothness == "auto":
            return None
        lr_A, lr_B = float(self.lr_A or 0), float(self.lr_B or 0)
        if not (lr_A and lr_B):
            raise ValueError(
                f"smoothness={smoothness!r} needs a learning rate above 0: pass the optimizer to rescale(), or use "
                "smoothness='auto'."
            )
        s2 = float(self.layer.scaling[self.adapter]) ** 2
        return 1 / (smoothness * lr_A * s2), 1 / (smoothness * lr_B * s2)


def _join(dim: int, dtype: torch.dtype, *kinds: list[Tensor]) -> Tensor:
    """Matrices of L layers, of each kind one a layer, one above the other (dim 0) or side by side (dim 1)."""
    kinds = [[tensor.detach().flatten(1) for tensor in kind] for kind in kinds]
    sizes, shape = [kind[0].shape[dim] for kind in kinds], list(kinds[0][0].shape)
    shape[dim] = sum(sizes)
    joined = torch.empty(len(kinds[0]), *shape, dtype=dtype, device=kinds[0][0].device)
    targets = [target for part in joined.split(sizes, dim=1 + dim) for target in part.unbind()]
    torch._foreach_copy_(targets, [tensor for kind in kinds for tensor in kind])
    return joined


class ShapeGroup:
    """Targets with one `group_key`; holds their factors and gradients, float32 or better."""

    def __init__(self, targets: list[Target]):
        self.targets, self.layer, self.adapter = targets, targets[0].layer, targets[0].adapter
        self.params_B, self.params_A = [t.lora_B for t in targets], [t.lora_A for t in targets]
        dtype = torch.promote_types(self.params_B[0].dtype, torch.float32)
        self.S_A_LMK = _join(1, dtype, self.params_B, [p.grad for p in self.params_B])
        self.S_B_LKN = _join(0, dtype, [p.grad for p in self.params_A], self.params_A)
        self.A_LMR, self.B_LRN = self.S_A_LMK.chunk(2, -1)[0], self.S_B_LKN.chunk(2, -2)[1]
        self.s = self.layer.initial_scaling(self.adapter)
        self.scaling = self.layer.scalora_config[self.adapter].scaling
        self.accumulators = [target.accumulator for target in targets]

    def take_scales(
        self,
        alpha_LR: Tensor,
        beta_LR: Tensor,
        folded_LR: Tensor,
        skipped_L: Tensor,
        carried_B: Tensor,
        carried_A: Tensor,
    ) -> None:
        """α, β, 1 - α∘β, which layers are skipped, and the `carried_scales` of lora_B and of lora_A."""
        self.alpha_LR, self.beta_LR, self.folded_LR, self.skipped_L = alpha_LR, beta_LR, folded_LR, skipped_L
        self.carried_B_KLR, self.carried_A_KLR = carried_B, carried_A

    def fold(self, report: RescaleReport) -> None:
        """The factors dU, dV of what scaling takes out of the factors, all zero for skipped layers."""
        A_LMR, B_LRN, alpha_LR, beta_LR = self.A_LMR, self.B_LRN, self.alpha_LR, self.beta_LR
        dtype_B, dtype_A = self.params_B[0].dtype, self.params_A[0].dtype
        new_A_LMR = (A_LMR * alpha_LR[:, None]).to(dtype_B).to(A_LMR.dtype)
        new_B_LRN = (B_LRN * beta_LR[..., None]).to(dtype_A).to(B_LRN.dtype)
        if min(torch.finfo(dtype).bits for dtype in (dtype_A, dtype_B)) < 32:
            dU_LMR, dV_LRN = rounded_fold_factors(A_LMR, B_LRN, new_A_LMR, new_B_LRN, self.s)
        else:
            dU_LMR, dV_LRN = fold_factors(A_LMR, B_LRN, self.folded_LR, self.s)
        skipped_L11 = self.skipped_L[:, None, None]
        self.dU_LMR, self.dV_LRN = (torch.where(skipped_L11, 0, t).float() for t in (dU_LMR, dV_LRN))
        grams = gram_matrices(
            _join(1, torch.float64, A_LMR, new_A_LMR, self.dU_LMR),
            _join(0, torch.float64, B_LRN, new_B_LRN, self.dV_LRN),
        )
        report.folds.append(FoldGrams(*grams, A_LMR.shape[-1], self.s, self.skipped_L))
        del self.S_A_LMK, self.S_B_LKN, self.A_LMR, self.B_LRN

    def carry(self, optimizer: OptimizerState) -> None:
        """Scale factors, gradients and optimizer state."""
        carry(optimizer, self.params_B, self.carried_B_KLR, dim=1)
        carry(optimizer, self.params_A, self.carried_A_KLR, dim=0)
        for target in self.targets:
            target.layer.progress(target.adapter).rescalings += 1

    # The accumulators.

    @property
    def columns(self) -> int:
        """Columns that the accumulators have in use with this fold."""
        return self.accumulators[0].columns + self.dU_LMR.shape[-1]

    @property
    def kept(self) -> int:
        """Columns that a recompression keeps: all where R columns hold any change without loss."""
        capacity, added = self.accumulators[0].capacity, self.dU_LMR.shape[-1]
        return capacity if self.accumulators[0].is_lossless else capacity - int(capacity * _FREE_PART) // added * added

    def fits(self) -> bool:
        return self.accumulators[0].fits(self.dU_LMR.shape[-1])

    def append(self) -> None:
        """Add folds that fit."""
        type(self.accumulators[0]).append(self.accumulators, self.dU_LMR, self.dV_LRN)

    def _parts(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """[U | dU] and [V; dV] in float64, a few layers at a time."""
        step = max(1, _WORKSPACE // ((self.dU_LMR.shape[-2] + self.dV_LRN.shape[-1]) * self.columns))
        for start in range(0, len(self.accumulators), step):
            part = slice(start, start + step)
            U, V = zip(*(accumulator.in_use() for accumulator in self.accumulators[part]))
            P_LMK = _join(1, torch.float64, U, self.dU_LMR[part])
            yield part, P_LMK, _join(0, torch.float64, V, self.dV_LRN[part])

    def grams(self) -> tuple[Tensor, Tensor]:
        """Gram matrices of [U | dU] and [V; dV]."""
        grams = [gram_matrices(P_LMK, Q_LKN) for _, P_LMK, Q_LKN in self._parts()]
        return tuple(parts[0] if len(parts) == 1 else torch.cat(parts) for parts in zip(*grams))

    def compress(self, left_LKR: Tensor, right_LRK: Tensor) -> None:
        """Replace U by [U | dU] left and V by right [V; dV]."""
        for part, P_LMK, Q_LKN in self._parts():
            accumulators = self.accumulators[part]
            type(accumulators[0]).replace(accumulators, P_LMK @ left_LKR[part], right_LRK[part] @ Q_LKN)


def _cat(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _target_norms(
    targets: list[Target], norms: tuple[float, float] | None, default: float | None
) -> tuple[Tensor, Tensor]:
    """Return 1 / (L η s²) for α and for β, of each layer: `norms`, else the rule's default, else the initial norm."""
    initial_L = torch.stack([t.layer.scalora_norms[t.adapter] for t in targets])[:, 0]
    if norms is None and default is None:
        return initial_L, initial_L
    alpha, beta = norms or (default, default)
    return torch.full_like(initial_L, alpha), torch.full_like(initial_L, beta)


def solve(groups: list[ShapeGroup], optimizer: OptimizerState, report: RescaleReport) -> None:
    """Give every group its `scales`, and those of its optimizer state."""
    by_system = defaultdict(list)
    for group in groups:
        powers = [tuple(optimizer.carried(p[0]).values()) for p in (group.params_B, group.params_A)]
        key = group.A_LMR.shape[-1], group.scaling, group.targets[0].squared_norms(), group.A_LMR.device, *powers
        by_system[key].append(group)
    for (_, scaling, norms, _, powers_B, powers_A), batch in by_system.items():
        grams = zip(*(gram_matrices(group.S_A_LMK, group.S_B_LKN) for group in batch))
        targets_norms = _target_norms(
            [target for group in batch for target in group.targets], norms, SCALINGS[scaling].column_norm2
        )
        scales = column_scales(*map(_cat, grams), *targets_norms, scaling)
        report.scales.append(scales)
        # Rounded once here, so that the fold and the factors use the same scales.
        alpha_LR, beta_LR = scales.alpha_Lr.float(), scales.beta_Lr.float()
        by_layer = alpha_LR, beta_LR, 1 - alpha_LR * beta_LR, scales.skipped_L
        carried = carried_scales(powers_B, alpha_LR, beta_LR), carried_scales(powers_A, beta_LR, alpha_LR)
        sizes = [len(group.targets) for group in batch]
        split = zip(*(t.split(sizes) for t in by_layer), *(t.split(sizes, dim=1) for t in carried))
        for group, parts in zip(batch, split):
            group.take_scales(*parts)


def accumulate(groups: list[ShapeGroup], report: RescaleReport) -> None:
    """Add every group's folds to its accumulators, recompressing those that are full."""
    full = defaultdict(list)
    for group in groups:
        if group.fits():
            group.append()
        else:
            full[group.columns, group.kept, group.dU_LMR.device].append(group)
    for (_, kept, _), batch in full.items():
        grams = zip(*(group.grams() for group in batch))
        left_LKR, right_LRK, discarded_L = truncation(*map(_cat, grams), kept)
        report.discarded_norms.append(discarded_L)
        norms = [t.layer.scalora_norms[t.adapter][1:] for group in batch for t in group.targets]
        torch._foreach_add_(norms, list(discarded_L.float()[:, None].unbind()))
        sizes = [len(group.targets) for group in batch]
        for group, left, right in zip(batch, left_LKR.split(sizes), right_LRK.split(sizes)):
            group.compress(left, right)
