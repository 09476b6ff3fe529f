"""One rescaling of the adapters an optimizer is about to step: scales -> fold -> accumulator -> moments."""

from __future__ import annotations

import warnings
import weakref
from collections import defaultdict
from contextlib import suppress
from dataclasses import replace
from itertools import chain

import torch
from torch import Tensor, nn

from ..layer import LAYERS, ScaLoRALayer
from .moments import OptimizerState, check_state
from .report import RescaleReport
from .shape_group import ShapeGroup, Target, accumulate, carry, fold, solve
from .sharding import assemble, check_ranks, has_gradients, is_sharded

# Optimizers that have been warned of.
_warned: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()


def base_learning_rate(group: dict) -> float | Tensor:
    """Return η of a parameter group before any schedule: in a warmup the scheduled one sends 1 / (L η) to infinity."""
    return group.get("initial_lr", group["lr"])


def parameters_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Return the parameters of all groups, in their order."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def base_learning_rates(optimizer: torch.optim.Optimizer) -> dict[int, float | Tensor]:
    """Return the base learning rate of every parameter, by the parameter's id."""
    return {id(p): base_learning_rate(group) for group in optimizer.param_groups for p in group["params"]}


def inner_optimizers(optimizer: torch.optim.Optimizer) -> list[torch.optim.Optimizer]:
    """Return the optimizers that this one holds and steps, as SAM and accelerate's do, and those that these hold."""
    found = {id(optimizer): optimizer}
    pending = [optimizer]
    while pending:
        for value in vars(pending.pop()).values():
            values = value.values() if isinstance(value, dict) else value
            for inner in values if isinstance(value, (dict, list, tuple)) else [value]:
                if isinstance(inner, torch.optim.Optimizer) and id(inner) not in found:
                    found[id(inner)] = inner
                    pending.append(inner)
    return list(found.values())[1:]


def targets_of(optimizer: torch.optim.Optimizer) -> list[Target]:
    """Return the adapters of which `optimizer` steps both factors, in the order of its parameters.

    That order is the same on all ranks. Parameters that an inner optimizer steps are left to that one, which holds
    their state. Warns, once an optimizer, of adapters of which it steps one factor only: nothing rescales those.
    """
    owners: dict[int, tuple[ScaLoRALayer, str]] = {}
    for layer in LAYERS:
        for adapter in tuple(layer.scalora_config):
            with suppress(KeyError):  # another thread has just deleted it
                owners |= {id(factor): (layer, adapter) for factor in layer.factors(adapter)}
    inner = {id(p) for each in inner_optimizers(optimizer) for p in parameters_of(each)}
    rates = {p: rate for p, rate in base_learning_rates(optimizer).items() if p not in inner}
    targets = []
    alone = set()
    for parameter in rates:
        if parameter not in owners:
            continue
        layer, adapter = owners[parameter]
        lora_B, lora_A = layer.factors(adapter)
        if id(lora_A) not in rates or id(lora_B) not in rates:
            alone.add(adapter)
        elif parameter == id(lora_A):
            targets.append(Target(layer, adapter, lora_B, lora_A, rates[id(lora_B)], rates[id(lora_A)]))
    if alone and optimizer not in _warned:
        _warned.add(optimizer)
        warnings.warn(
            f"{type(optimizer).__name__} steps only one factor of layers of the ScaLoRA adapter "
            f"{', '.join(map(repr, sorted(alone)))}, so these stay plain LoRA. Give lora_A and lora_B of a layer, both "
            "with requires_grad, to one optimizer."
        )
    return targets


def rescale(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> RescaleReport:
    """Rescale every trainable ScaLoRA adapter of `model` now, with the gradients that are in place.

    Training needs no call: a hook on torch's optimizers does this when `scaling_interval` is due. Pass the optimizer
    that trains the adapters, or one that holds it, so that its moments are carried along.

    Args:
        model: a model with ScaLoRA layers, each with its gradients.
        optimizer: the optimizer whose learning rates are used and whose state is carried along.

    Returns:
        A report of the scales and folds. Layers without gradients are counted in it as skipped.

    Raises:
        TypeError: the optimizer keeps state that cannot be carried through a rescaling.
        ValueError: there is no ScaLoRA adapter, or smoothness is a number and there is no learning rate.
    """
    layers = [module for module in model.modules() if isinstance(module, ScaLoRALayer)]
    if not layers:
        raise ValueError("model has no ScaLoRA layer: build it with get_peft_model(model, ScaLoRAConfig(...)).")
    report = RescaleReport()
    if optimizer is None:
        targets = [
            Target(layer, adapter, *layer.factors(adapter), None, None)
            for layer in layers
            for adapter in layer.scalora_config
            if all(factor.requires_grad for factor in layer.factors(adapter))
        ]
        rescale_targets(targets, OptimizerState.of(None), report)
        return report
    owned = set(map(id, layers))
    stepped = []
    for each in (optimizer, *inner_optimizers(optimizer)):
        targets = [target for target in targets_of(each) if id(target.layer) in owned]
        if targets:
            check_state(each, *(target.lora_A for target in targets))
            stepped.append((targets, OptimizerState.of(each)))
    if not stepped:
        raise ValueError("optimizer steps no ScaLoRA adapter of model: pass the one that trains it.")
    for targets, state in stepped:
        rescale_targets(targets, state, report)
    return report


@torch.no_grad()
def rescale_targets(targets: list[Target], optimizer: OptimizerState, report: RescaleReport) -> None:
    """Rescale targets and add to the report; where their factors are sharded, through whole copies."""
    sharded = {is_sharded(target.lora_A) for target in targets}
    if len(sharded) == 2:
        raise TypeError(
            "ScaLoRA cannot rescale adapters of which some are sharded and some are not: shard all of them."
        )
    ready = [target for target in targets if has_gradients(target.lora_B, target.lora_A)]
    report.without_gradient += len(targets) - len(ready)
    if True not in sharded:
        _rescale_whole(ready, optimizer, report)
        return
    pairs = [(target.lora_B, target.lora_A) for target in ready]
    factors, optimizer = assemble(chain.from_iterable(pairs), optimizer)
    whole = [
        replace(target, lora_B=lora_B.whole, lora_A=lora_A.whole)
        for target, lora_B, lora_A in zip(ready, factors[::2], factors[1::2])
    ]
    _rescale_whole(whole, optimizer, report)
    for factor in factors:
        factor.write()


def _rescale_whole(targets: list[Target], optimizer: OptimizerState, report: RescaleReport) -> None:
    by_shape = defaultdict(list)
    for target in targets:
        if target.lora_A.dim() < 2:
            raise TypeError("ScaLoRA cannot rescale flattened parameters (FSDP1): use FSDP2 (fsdp_version: 2), or DDP.")
        if target.lora_B.grad.is_sparse or target.lora_A.grad.is_sparse:
            raise ValueError("ScaLoRA needs dense gradients: do not target nn.Embedding(sparse=True).")
        by_shape[target.group_key(optimizer)].append(target)
    groups = [ShapeGroup(group) for group in by_shape.values()]
    scales = solve(groups, optimizer, report)
    folds = [fold(group, group_scales, report) for group, group_scales in zip(groups, scales)]
    accumulate(groups, folds, report)
    for group, group_scales in zip(groups, scales):
        carry(group, group_scales, optimizer)
    check_ranks(
        (f"{name} of layer {i}", tensor) for i, t in enumerate(targets) for name, tensor in t.rescaled_tensors().items()
    )
