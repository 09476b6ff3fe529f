"""One rescaling of the adapters an optimizer is about to step: scales -> fold -> accumulator -> moments."""

from __future__ import annotations

import weakref
from collections import defaultdict

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from .layer import LAYERS, ScaLoRALayer
from .moments import check_state, rule_for
from .report import RescaleReport
from .shape_group import ShapeGroup, Target, accumulate, solve


def _base_learning_rate(group: dict) -> float | Tensor:
    """η is the rate before any schedule: during warmup the scheduled one would send 1 / (L η) to infinity."""
    return group.get("initial_lr", group["lr"])


def _targets_of(optimizer: torch.optim.Optimizer) -> list[Target]:
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
                targets.append(Target(layer, adapter, lora_B, lora_A, rates[id(lora_B)], rates[parameter]))
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
        Target(layer, adapter, *layer.factors(adapter), None, None)
        for layer in layers
        for adapter in layer.scalora_U
        if all(factor.requires_grad for factor in layer.factors(adapter))
    ]
    return _rescale(targets, None)


@torch.no_grad()
def _rescale(targets: list[Target], optimizer: torch.optim.Optimizer | None) -> RescaleReport:
    report = RescaleReport()
    by_shape = defaultdict(list)
    for target in targets:
        if target.lora_B.grad is None or target.lora_A.grad is None:
            report.without_gradient += 1
        else:
            _check(target, optimizer)
            by_shape[target.group_key(optimizer)].append(target)
    groups = [ShapeGroup(group) for group in by_shape.values()]
    solve(groups, optimizer, report)
    for group in groups:
        group.fold(report)
    accumulate(groups, report)
    for group in groups:
        group.carry(optimizer)
    return report


def _check(target: Target, optimizer: torch.optim.Optimizer | None) -> None:
    if hasattr(target.lora_A, "full_tensor"):
        raise TypeError(
            "ScaLoRA cannot rescale sharded parameters (DTensor, as FSDP2 makes) yet: train with DDP, or on one device."
        )
    if target.lora_B.grad.is_sparse or target.lora_A.grad.is_sparse:
        raise ValueError("ScaLoRA needs dense gradients: do not target nn.Embedding(sparse=True).")
    if optimizer is not None:
        check_state(optimizer, target.lora_A)


_reports: weakref.WeakKeyDictionary[torch.optim.Optimizer, RescaleReport] = weakref.WeakKeyDictionary()


def last_report(optimizer: torch.optim.Optimizer) -> RescaleReport | None:
    """The report of the latest automatic rescaling before a step of `optimizer`; None before the first."""
    return _reports.get(getattr(optimizer, "optimizer", optimizer))


def _before_step(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
    """Runs before every step of every torch optimizer."""
    # Without a rule and without state it may be a wrapper, whose inner optimizer runs this hook again.
    if not LAYERS or not (rule_for(optimizer) or any(optimizer.state.values())):
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
