"""Adapters of one shape, rescaled with one set of kernels whatever their number.

A rescaling is a chain of stages, each of which returns what the next one needs: `solve` gives every group its
`GroupScales`, `fold` the change that scaling takes out of the factors, `accumulate` adds folds to the accumulators, and
`carry` scales factors, gradients and optimizer state. The parameters are written in the last two only.

PEFT's names end in this file: lora_B is the left factor, lora_A the right one. Shape suffixes are those of
`peft_scalora.maths`. Nothing here waits for the accelerator: decisions that depend on a tensor's values are masks. What
is small, (2r x 2r) and (K x K), is computed for several groups at once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn

from ..accumulator import Accumulator
from ..layer import ScaLoRALayer
from ..maths.accumulator import fold_factors, rounded_fold_factors, truncation
from ..maths.scaling import SCALINGS, column_scales, gram_matrices
from .moments import OptimizerState, carried_scales
from .moments import carry as carry_state
from .report import FoldGrams, RescaleReport

# Float64 numbers that recompressions hold at a time (32 MiB), so that many layers do not add up to a weight.
_WORKSPACE = 2**22
# A recompression leaves up to one column in so many free, for whole folds that need none: one fold, where R is 7 r.
_FREE_ONE_IN = 7


@dataclass(frozen=True)
class Target:
    """Adapter in one layer, with the learning rates of its factors."""

    layer: ScaLoRALayer
    adapter: str
    lora_B: nn.Parameter
    lora_A: nn.Parameter
    lr_B: float | Tensor | None
    lr_A: float | Tensor | None

    @property
    def accumulator(self) -> Accumulator:
        """View of the change accumulated so far."""
        return self.layer.accumulator(self.adapter)

    def group_key(self, optimizer: OptimizerState) -> tuple:
        """Return what targets that are rescaled as one batch have in common."""
        scaling = self.layer.scalora_config[self.adapter].scaling
        accumulator = self.accumulator
        held = type(accumulator), accumulator.shape, accumulator.capacity, accumulator.columns
        factors = self.lora_B.shape, self.lora_A.shape, self.lora_B.dtype, self.lora_A.dtype, self.lora_B.device
        states = [tuple(optimizer.carried(factor)) for factor in (self.lora_B, self.lora_A)]
        return *factors, *held, *states, scaling, accumulator.fold_scale, self.target_norms2()

    def rescaled_tensors(self) -> dict[str, Tensor]:
        """Return every tensor that a rescaling writes, apart from gradients and optimizer state."""
        return self.accumulator.tensors | {"lora_B": self.lora_B, "lora_A": self.lora_A}

    def target_norms2(self) -> tuple[float, float] | None:
        """Return 1 / (L η s²) for α and for β; None where it follows the initial column norm, which differs by layer.

        α scales the columns of lora_B, and with them the gradient of lora_A: it goes with lora_A's rate, and β with
        lora_B's.
        """
        config = self.layer.scalora_config[self.adapter]
        if config.column_norm2 is not None:
            return config.column_norm2, config.column_norm2
        if config.smoothness == "auto":
            return None
        lr_A, lr_B = float(self.lr_A or 0), float(self.lr_B or 0)
        if not (lr_A and lr_B):
            raise ValueError(
                f"smoothness={config.smoothness!r} needs a learning rate above 0: pass the optimizer to rescale(), or "
                "use smoothness='auto'."
            )
        s2 = float(self.layer.scaling[self.adapter]) ** 2
        return 1 / (config.smoothness * lr_A * s2), 1 / (config.smoothness * lr_B * s2)


@dataclass(frozen=True)
class ShapeGroup:
    """Targets with one `group_key`."""

    targets: list[Target]

    @property
    def lefts(self) -> list[nn.Parameter]:
        return [target.lora_B for target in self.targets]

    @property
    def rights(self) -> list[nn.Parameter]:
        return [target.lora_A for target in self.targets]

    @property
    def accumulators(self) -> list[Accumulator]:
        return [target.accumulator for target in self.targets]

    @property
    def s(self) -> float:
        """Scale s at which change is folded."""
        return self.targets[0].accumulator.fold_scale

    def powers(self, optimizer: OptimizerState) -> tuple[tuple[int, ...], ...]:
        """Return the powers of the scale that the carried states of a left and of a right factor have."""
        first = self.targets[0]
        return tuple(tuple(optimizer.carried(factor).values()) for factor in (first.lora_B, first.lora_A))

    def system_key(self, optimizer: OptimizerState) -> tuple:
        """Return what groups have in common whose scales are solved for together."""
        first = self.targets[0]
        scaling = first.layer.scalora_config[first.adapter].scaling
        return scaling, first.target_norms2(), *self.powers(optimizer), first.lora_A.shape[0], first.lora_A.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype that factors are scaled in: float32 or better."""
        return torch.promote_types(self.targets[0].lora_B.dtype, torch.float32)

    def grams(self) -> tuple[Tensor, Tensor]:
        """Return the Gram matrices of [left, its gradient] and of [gradient of right; right], (L, 2r, 2r)."""
        lefts, rights = self.lefts, self.rights
        return gram_matrices(
            _join(1, torch.float64, lefts, [left.grad for left in lefts]),
            _join(0, torch.float64, [right.grad for right in rights], rights),
        )


@dataclass(frozen=True)
class GroupScales:
    """Scales of a batch of layers in float32, and of what is carried with them."""

    alpha_Lr: Tensor
    beta_Lr: Tensor
    folded_Lr: Tensor  # 1 - α∘β
    skipped_L: Tensor
    carried_left_KLr: Tensor  # `carried_scales` of the left factors
    carried_right_KLr: Tensor

    def split(self, sizes: list[int]) -> list[GroupScales]:
        """Return the scales of consecutive parts of the batch."""
        by_layer = self.alpha_Lr, self.beta_Lr, self.folded_Lr, self.skipped_L
        by_kind = self.carried_left_KLr, self.carried_right_KLr
        parts = [t.split(sizes) for t in by_layer] + [t.split(sizes, dim=1) for t in by_kind]
        return [GroupScales(*part) for part in zip(*parts)]


@dataclass(frozen=True)
class Fold:
    """Change U V, float32, that scaling takes out of the factors of a group: zero for skipped layers."""

    U_LMK: Tensor
    V_LKN: Tensor


def _join(dim: int, dtype: torch.dtype, *kinds: Sequence[Tensor] | Tensor) -> Tensor:
    """Return matrices of L layers, of each kind one a layer, one above the other (dim 0) or side by side (dim 1)."""
    matrices = [[tensor.detach().flatten(1) for tensor in kind] for kind in kinds]
    first = matrices[0][0]
    sizes = [kind[0].shape[dim] for kind in matrices]
    shape = list(first.shape)
    shape[dim] = sum(sizes)
    joined = torch.empty(len(matrices[0]), *shape, dtype=dtype, device=first.device)
    places = [part.unbind() for part in joined.split(sizes, dim=1 + dim)]
    torch._foreach_copy_(list(chain.from_iterable(places)), list(chain.from_iterable(matrices)))
    return joined


def _cat(pairs: Iterable[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Join the first and the second tensors of pairs along their layers."""
    return [tensors[0] if len(tensors) == 1 else torch.cat(tensors) for tensors in zip(*pairs)]


def solve(groups: list[ShapeGroup], optimizer: OptimizerState, report: RescaleReport) -> list[GroupScales]:
    """Return the scales of every group, those of one rank and rule in one batch."""
    by_system = defaultdict(list)
    for index, group in enumerate(groups):
        by_system[group.system_key(optimizer)].append(index)
    solved: dict[int, GroupScales] = {}
    for (scaling, target_norms2, powers_left, powers_right, *_), indices in by_system.items():
        batch = [groups[index] for index in indices]
        gram_left, gram_right = _cat(group.grams() for group in batch)
        targets = [target for group in batch for target in group.targets]
        target2_alpha, target2_beta = _target_norms2(targets, target_norms2, scaling)
        scales = column_scales(gram_left, gram_right, target2_alpha, target2_beta, scaling)
        report.scales.append(scales)
        # Rounded once here, so that the fold and the factors use the same scales.
        alpha_Lr, beta_Lr = scales.alpha_Lr.float(), scales.beta_Lr.float()
        carried = carried_scales(powers_left, alpha_Lr, beta_Lr), carried_scales(powers_right, beta_Lr, alpha_Lr)
        whole = GroupScales(alpha_Lr, beta_Lr, 1 - alpha_Lr * beta_Lr, scales.skipped_L, *carried)
        solved |= zip(indices, whole.split([len(group.targets) for group in batch]))
    return [solved[index] for index in range(len(groups))]


def _target_norms2(targets: list[Target], given: tuple[float, float] | None, scaling: str) -> tuple[Tensor, Tensor]:
    """Return 1 / (L η s²) for α and for β, of each layer: as given, else as the rule makes it of the initial norm."""
    initial_L = torch.stack([target.layer.scalora_norms[target.adapter] for target in targets])[:, 0]
    if given is None:
        target_L = SCALINGS[scaling].initial_norms * initial_L
        return target_L, target_L
    return torch.full_like(initial_L, given[0]), torch.full_like(initial_L, given[1])


def fold(group: ShapeGroup, scales: GroupScales, report: RescaleReport) -> Fold:
    """Return what scaling takes out of the factors, rounding them to their dtype included."""
    lefts, rights = group.lefts, group.rights
    left_LMr, right_LrN = _join(1, group.dtype, lefts), _join(0, group.dtype, rights)
    # As `moments.multiply` will round them.
    new_left_LMr = (left_LMr * scales.alpha_Lr[:, None]).to(lefts[0].dtype).to(group.dtype)
    new_right_LrN = (right_LrN * scales.beta_Lr[..., None]).to(rights[0].dtype).to(group.dtype)
    if min(torch.finfo(factors[0].dtype).bits for factors in (lefts, rights)) < 32:
        U_LMK, V_LKN = rounded_fold_factors(left_LMr, right_LrN, new_left_LMr, new_right_LrN, group.s)
    else:
        U_LMK, V_LKN = fold_factors(left_LMr, right_LrN, scales.folded_Lr, group.s)
    skipped_L11 = scales.skipped_L[:, None, None]
    U_LMK = torch.where(skipped_L11, 0, U_LMK).float()
    V_LKN = torch.where(skipped_L11, 0, V_LKN).float()
    grams = gram_matrices(
        _join(1, torch.float64, left_LMr, new_left_LMr, U_LMK), _join(0, torch.float64, right_LrN, new_right_LrN, V_LKN)
    )
    report.folds.append(FoldGrams(*grams, left_LMr.shape[-1], group.s, scales.skipped_L))
    return Fold(U_LMK, V_LKN)


def accumulate(groups: list[ShapeGroup], folds: list[Fold], report: RescaleReport) -> None:
    """Add every group's fold to its accumulators, recompressing those that are full."""
    full = defaultdict(list)
    for group, change in zip(groups, folds):
        accumulators = group.accumulators
        added = change.V_LKN.shape[-2]
        if accumulators[0].fits(added):
            type(accumulators[0]).append(accumulators, change.U_LMK, change.V_LKN)
        else:
            kept = _columns_kept(accumulators[0], added)
            full[accumulators[0].columns + added, kept, change.V_LKN.device].append((group, change))
    for (columns, kept, _), batch in full.items():
        for pieces in _pieces(batch, columns):
            _recompress(pieces, kept, report)


def _columns_kept(accumulator: Accumulator, added: int) -> int:
    """Return the columns that a recompression keeps: all where they hold any change without loss."""
    if accumulator.is_lossless:
        return accumulator.capacity
    return accumulator.capacity - accumulator.capacity // _FREE_ONE_IN // added * added


def _pieces(batch: list[tuple[ShapeGroup, Fold]], columns: int) -> Iterator[list[tuple[list[Target], Fold]]]:
    """Cut full accumulators into batches, of which each fits the workspace, of layers of one shape."""
    pieces: list[tuple[list[Target], Fold]] = []
    free = _WORKSPACE
    for group, change in batch:
        size = (change.U_LMK.shape[-2] + change.V_LKN.shape[-1]) * columns
        start = 0
        while start < len(group.targets):
            if pieces and free < size:
                yield pieces
                pieces, free = [], _WORKSPACE
            part = slice(start, start + max(1, free // size))
            pieces.append((group.targets[part], Fold(change.U_LMK[part], change.V_LKN[part])))
            start += len(group.targets[part])
            free -= size * len(group.targets[part])
    yield pieces


def _recompress(pieces: list[tuple[list[Target], Fold]], kept: int, report: RescaleReport) -> None:
    """Replace U V of full accumulators by the best approximation of rank `kept` of U V and their folds."""
    joined = []
    for targets, change in pieces:
        U, V = zip(*(target.accumulator.in_use() for target in targets))
        joined.append((_join(1, torch.float64, U, change.U_LMK), _join(0, torch.float64, V, change.V_LKN)))
    gram_left, gram_right = _cat(gram_matrices(*pair) for pair in joined)
    left_LKC, right_LCK, discarded_L = truncation(gram_left, gram_right, kept)
    report.discarded_norms.append(discarded_L)
    norms = [target.layer.scalora_norms[target.adapter][1:] for targets, _ in pieces for target in targets]
    torch._foreach_add_(norms, list(discarded_L.float()[:, None].unbind()))
    sizes = [len(targets) for targets, _ in pieces]
    for (targets, _), (P_LMK, Q_LKN), left, right in zip(pieces, joined, left_LKC.split(sizes), right_LCK.split(sizes)):
        accumulators = [target.accumulator for target in targets]
        type(accumulators[0]).replace(accumulators, P_LMK @ left, right @ Q_LKN)


def carry(group: ShapeGroup, scales: GroupScales, optimizer: OptimizerState) -> None:
    """Scale factors, gradients and optimizer state, and count the rescaling."""
    carry_state(optimizer, group.lefts, scales.carried_left_KLr, dim=1)
    carry_state(optimizer, group.rights, scales.carried_right_KLr, dim=0)
    for target in group.targets:
        target.layer.progress(target.adapter).rescalings += 1
