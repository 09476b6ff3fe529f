"""One rescaling of the adapters an optimizer is about to step: scales -> fold -> accumulator -> moments.

Layers of one shape are handled together. Nothing here waits for the accelerator: decisions that depend on a tensor's
values are masks, and the report keeps tensors until somebody reads it.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from .accumulator import fold_factors, rounded_fold_factors, truncate
from .layer import LAYERS, ScaLoRALayer
from .moments import check_state, multiply, rule_for, transport
from .scaling import Scales, column_scales

# Float64 numbers that one recompression may hold at a time (256 MiB), so that many layers do not add up to a weight.
_WORKSPACE = 2**25


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
    _groups: list[tuple[str, Scales]] = field(default_factory=list)
    _fold_errors: list[Tensor] = field(default_factory=list)
    _discarded: list[Tensor] = field(default_factory=list)

    def _count(self, name: str) -> int:
        """Layers scaled by the rule `name`."""
        total = 0
        for scaling, scales in self._groups:
            by_rule = ~scales.skipped_L
            if scaling != "exact":
                by_rule = by_rule & (scales.by_column_L if name == "column" else ~scales.by_column_L)
            total += int(by_rule.sum()) if (scaling == "exact") == (name == "exact") else 0
        return total

    layers = property(lambda self: self.without_gradient + sum(len(s.skipped_L) for _, s in self._groups))
    column = property(lambda self: self._count("column"))
    scalar = property(lambda self: self._count("scalar"))
    exact = property(lambda self: self._count("exact"))
    skipped = property(lambda self: self.without_gradient + sum(int(s.skipped_L.sum()) for _, s in self._groups))
    fold_error = property(lambda self: max((float(e.max()) for e in self._fold_errors), default=0.0))
    discarded = property(lambda self: sum(float(d.square().sum()) for d in self._discarded) ** 0.5)

    @property
    def median_log_alpha(self) -> float:
        logs = [s.alpha_LR[~s.skipped_L].log().abs().flatten().cpu() for _, s in self._groups]
        logs = torch.cat(logs) if logs else torch.zeros(0)
        return float(logs.quantile(0.5)) if len(logs) else 0.0

    def __repr__(self) -> str:
        names = ("layers", "column", "scalar", "exact", "skipped")
        counts = ", ".join(f"{name}={getattr(self, name)}" for name in names)
        errors = f"fold_error={self.fold_error:.2g}, discarded={self.discarded:.2g}"
        return f"RescaleReport({counts}, median_log_alpha={self.median_log_alpha:.3g}, {errors})"


@dataclass(frozen=True)
class _Target:
    """One adapter in one layer, with the learning rates of its factors."""

    layer: ScaLoRALayer
    adapter: str
    lora_B: nn.Parameter
    lora_A: nn.Parameter
    lr_B: float | Tensor | None
    lr_A: float | Tensor | None

    def group_key(self) -> tuple:
        """Targets with equal keys are rescaled as one batch."""
        layer, adapter, config = self.layer, self.adapter, self.layer.scalora_config[self.adapter]
        columns = layer.progress(adapter).columns
        accumulator = (layer.scalora_U[adapter].shape, layer.scalora_V[adapter].shape, columns)
        factors = (self.lora_B.shape, self.lora_A.shape, self.lora_B.dtype, self.lora_A.dtype, self.lora_B.device)
        return *factors, *accumulator, config.scaling, layer.initial_scaling(adapter), self.squared_norms()

    def squared_norms(self) -> tuple[float, float] | None:
        """1 / (L η s²) for α and for β; None with smoothness="auto". Paper A is stepped with lora_B's rate, and α
        scales the gradient of lora_A: α belongs to lora_A's rate."""
        smoothness = self.layer.scalora_config[self.adapter].smoothness
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


def _base_learning_rate(group: dict) -> float | Tensor:
    """η is the rate before any schedule: during warmup the scheduled one would send 1 / (L η) to infinity."""
    return group.get("initial_lr", group["lr"])


def _targets_of(optimizer: torch.optim.Optimizer) -> list[_Target]:
    """The adapters of which `optimizer` steps both factors, in the order of its parameters (equal on all ranks)."""
    owners = {}
    for layer in LAYERS:
        for adapter in layer.scalora_U:
            lora_B, lora_A = layer.factors(adapter)
            owners[id(lora_A)] = (layer, adapter, lora_B, lora_A)
    rates = {id(p): _base_learning_rate(group) for group in optimizer.param_groups for p in group["params"]}
    targets = []
    for parameter in rates:
        if parameter in owners:
            layer, adapter, lora_B, lora_A = owners[parameter]
            if id(lora_B) in rates:
                targets.append(_Target(layer, adapter, lora_B, lora_A, rates[id(lora_B)], rates[parameter]))
    return targets


def rescale(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> RescaleReport:
    """Rescale every trainable ScaLoRA adapter of `model` now, with the gradients that are in place.

    Training needs no call: a hook on torch's optimizers does this when `scaling_interval` is due. Pass the optimizer
    that trains the adapters, so that its moments are carried along.

    Raises:
        TypeError: the optimizer keeps state that cannot be carried through a rescaling.
        ValueError: there is no ScaLoRA adapter, or smoothness is a number and there is no learning rate.
    """
    layers = [module for module in model.modules() if isinstance(module, ScaLoRALayer)]
    if not layers:
        raise ValueError("model has no ScaLoRA layer: build it with get_peft_model(model, ScaLoRAConfig(...)).")
    if optimizer is not None:
        optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps the optimizer that holds the state
        owned = set(map(id, layers))
        targets = [target for target in _targets_of(optimizer) if id(target.layer) in owned]
        if not targets:
            raise ValueError("optimizer steps no ScaLoRA adapter of model: pass the one that trains it.")
        return _rescale(targets, optimizer)
    targets = [
        _Target(layer, adapter, *layer.factors(adapter), None, None)
        for layer in layers
        for adapter in layer.scalora_U
        if all(factor.requires_grad for factor in layer.factors(adapter))
    ]
    return _rescale(targets, None)


@torch.no_grad()
def _rescale(targets: list[_Target], optimizer: torch.optim.Optimizer | None) -> RescaleReport:
    report = RescaleReport()
    groups = defaultdict(list)
    for target in targets:
        if target.lora_B.grad is None or target.lora_A.grad is None:
            report.without_gradient += 1
        else:
            if hasattr(target.lora_A, "full_tensor"):
                raise TypeError(
                    "ScaLoRA cannot rescale sharded parameters (DTensor, as FSDP2 makes) yet: train with DDP, or on "
                    "one device."
                )
            if target.lora_B.grad.is_sparse or target.lora_A.grad.is_sparse:
                raise ValueError("ScaLoRA needs dense gradients: do not target nn.Embedding(sparse=True).")
            if optimizer is not None:
                check_state(optimizer, target.lora_A)
            groups[target.group_key()].append(target)
    for group in groups.values():
        _rescale_group(group, optimizer, report)
    return report


def _stack(tensors: list[Tensor]) -> Tensor:
    return torch.stack([tensor.detach().flatten(1) for tensor in tensors]).float()


def _rescale_group(group: list[_Target], optimizer: torch.optim.Optimizer | None, report: RescaleReport) -> None:
    """Rescale targets of one shape. Shape suffixes as in scaling.py."""
    first = group[0]
    params_B, params_A = [t.lora_B for t in group], [t.lora_A for t in group]
    A_LMR, B_LNR = _stack(params_B), _stack(params_A).mT
    GB_LMR, GtA_LNR = _stack([p.grad for p in params_B]), _stack([p.grad for p in params_A]).mT
    scaling = first.layer.scalora_config[first.adapter].scaling
    scales = column_scales(A_LMR, B_LNR, GB_LMR, GtA_LNR, *_squared_norms(group, A_LMR), scaling)
    # Rounded once here, so that the fold and the factors use the same scales.
    alpha_LR, beta_LR = scales.alpha_LR.float(), scales.beta_LR.float()
    new_A_LMR = (A_LMR * alpha_LR[:, None]).to(first.lora_B.dtype).float()
    new_B_LNR = (B_LNR * beta_LR[:, None]).to(first.lora_A.dtype).float()

    s = first.layer.initial_scaling(first.adapter)
    if min(torch.finfo(p.dtype).bits for p in (first.lora_B, first.lora_A)) < 32:
        dU_LMR, dV_LRN = rounded_fold_factors(A_LMR, B_LNR, new_A_LMR, new_B_LNR, s)
    else:
        dU_LMR, dV_LRN = fold_factors(A_LMR, B_LNR, alpha_LR.double(), beta_LR.double(), s)
    skipped_L11 = scales.skipped_L[:, None, None]
    dU_LMR, dV_LRN = torch.where(skipped_L11, 0, dU_LMR).float(), torch.where(skipped_L11, 0, dV_LRN)
    report._groups.append((scaling, scales))
    errors_L = _fold_error((A_LMR, -new_A_LMR, -dU_LMR / s), (B_LNR, new_B_LNR, dV_LRN.mT))
    report._fold_errors.append(torch.where(scales.skipped_L, 0, errors_L))
    discarded_L = _accumulate(group, dU_LMR, dV_LRN, scales.skipped_L)
    if discarded_L is not None:
        report._discarded.append(discarded_L)

    multiply(params_B, alpha_LR, dim=1)
    multiply(params_A, beta_LR, dim=0)
    multiply([p.grad for p in params_B], beta_LR, dim=1)
    multiply([p.grad for p in params_A], alpha_LR, dim=0)
    if optimizer is not None:
        transport(optimizer, params_B, beta_LR, dim=1)
        transport(optimizer, params_A, alpha_LR, dim=0)
    for target in group:
        target.layer.progress(target.adapter).rescalings += 1


def _squared_norms(group: list[_Target], like: Tensor) -> tuple[Tensor, Tensor]:
    norms = group[0].squared_norms()
    if norms is None:
        norm2_L = torch.stack([t.layer.scalora_norms[t.adapter][0] for t in group])
        return norm2_L, norm2_L
    return like.new_full((len(group),), norms[0]), like.new_full((len(group),), norms[1])


def _fold_error(left: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> Tensor:
    """‖A Bᵀ - Ã B̃ᵀ - fold‖_F / ‖A Bᵀ‖_F of the rounded tensors, by Gram matrices (its own floor is 1e-8)."""
    P, Q = torch.cat(left, -1).double(), torch.cat(right, -1).double()
    products = (P.mT @ P) * (Q.mT @ Q)
    R = left[0].shape[-1]
    whole_L = products[:, :R, :R].sum((-2, -1))
    error_L = (products.sum((-2, -1)).clamp(min=0) / whole_L).sqrt()
    return torch.where(whole_L == 0, 0, error_L)


def _accumulate(group: list[_Target], dU_LMR: Tensor, dV_LRN: Tensor, skipped_L: Tensor) -> Tensor | None:
    """Add the folds to the accumulators; returns the norms that recompression discarded, if there was one."""
    first = group[0]
    U, V = ([getattr(t.layer, name)[t.adapter] for t in group] for name in ("scalora_U", "scalora_V"))
    used, added, room = first.layer.progress(first.adapter).columns, dU_LMR.shape[-1], V[0].shape[0]
    discarded_L = None
    if first.layer.is_dense(first.adapter):
        used = 1
        torch._foreach_add_(U, list((dU_LMR @ dV_LRN).unbind()))
    elif used + added <= room:
        torch._foreach_copy_([u[:, used : used + added] for u in U], list(dU_LMR.unbind()))
        torch._foreach_copy_([v[used : used + added] for v in V], list(dV_LRN.unbind()))
        used += added
    else:
        discarded_L = _recompress(U, V, used, dU_LMR, dV_LRN, skipped_L)
        torch._foreach_add_([t.layer.scalora_norms[t.adapter][1:] for t in group], list(discarded_L.float()[:, None]))
        used = room
    for target in group:
        target.layer.progress(target.adapter).columns = used
    return discarded_L


def _recompress(
    U: list[Tensor], V: list[Tensor], used: int, dU_LMR: Tensor, dV_LRN: Tensor, skipped_L: Tensor
) -> Tensor:
    """Replace [U | dU] [V; dV] by its best approximation that fits, a few layers at a time; skipped ones stay."""
    size = (U[0].shape[0] + V[0].shape[1]) * (used + dU_LMR.shape[-1])
    step, discarded = max(1, _WORKSPACE // size), []
    for start in range(0, len(U), step):
        part = slice(start, start + step)
        P = torch.cat([torch.stack([u[:, :used] for u in U[part]]), dU_LMR[part]], -1)
        Q = torch.cat([torch.stack([v[:used] for v in V[part]]), dV_LRN[part]], -2)
        new_U, new_V, discarded_L = truncate(P, Q, V[0].shape[0])
        skip = skipped_L[part, None, None]
        old_U, old_V = [u[:, : new_U.shape[-1]] for u in U[part]], [v[: new_V.shape[-2]] for v in V[part]]
        torch._foreach_copy_(old_U, list(torch.where(skip, torch.stack(old_U), new_U).unbind()))
        torch._foreach_copy_(old_V, list(torch.where(skip, torch.stack(old_V), new_V).unbind()))
        discarded.append(torch.where(skipped_L[part], 0, discarded_L))
    return torch.cat(discarded)


_reports: weakref.WeakKeyDictionary[torch.optim.Optimizer, RescaleReport] = weakref.WeakKeyDictionary()


def last_report(optimizer: torch.optim.Optimizer) -> RescaleReport | None:
    """The report of the latest automatic rescaling before a step of `optimizer`; None before the first."""
    return _reports.get(getattr(optimizer, "optimizer", optimizer))


def _before_step(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
    """Runs before every step of every torch optimizer."""
    # Without a rule and without state it may be a wrapper, whose inner optimizer runs this hook again.
    if not LAYERS or not (rule_for(optimizer) or any(optimizer.state.values())):
        return
    if not getattr(optimizer, "begins_outer_step", True):  # GaussNewton's other steps leave the weights alone
        return
    due = []
    for target in _targets_of(optimizer):
        check_state(optimizer, target.lora_A)
        if target.lora_B.grad is None or target.lora_A.grad is None:
            continue  # not stepped, or a closure is about to compute them
        progress = target.layer.progress(target.adapter)
        progress.steps += 1
        if progress.steps % target.layer.scalora_config[target.adapter].scaling_interval == 0:
            due.append(target)
    if due:
        _reports[optimizer] = _rescale(due, optimizer)


def install_hook() -> None:
    """Make torch's optimizers rescale on their own; once per process."""
    register_optimizer_step_pre_hook(_before_step)
