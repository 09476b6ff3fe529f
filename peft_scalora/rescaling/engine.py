"""One rescaling of the adapters an optimizer is about to step: scales -> fold -> accumulator -> moments."""

from __future__ import annotations

import sys
import warnings
import weakref
from collections import defaultdict
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from .._seams import STEP_CODE
from ..layer import LAYERS, ScaLoRALayer
from .moments import OptimizerState, check_state, rule_for
from .report import RescaleReport
from .shape_group import ShapeGroup, Target, accumulate, solve
from .sharding import assemble, check_ranks, has_gradients, is_sharded, is_zero, whole_value, wire_deepspeed


def _base_learning_rate(group: dict) -> float | Tensor:
    """η is the rate before any schedule: during warmup the scheduled one would send 1 / (L η) to infinity."""
    return group.get("initial_lr", group["lr"])


def _targets_of(optimizer: torch.optim.Optimizer) -> list[Target]:
    """The adapters of which `optimizer` steps both factors, in the order of its parameters (equal on all ranks).

    Warns, once an optimizer, of adapters of which it steps one factor only: nothing rescales those.
    """
    owners = {}
    for layer in LAYERS:
        for adapter in layer.scalora_config:
            lora_B, lora_A = layer.factors(adapter)
            owners[id(lora_A)] = owners[id(lora_B)] = (layer, adapter, lora_B, lora_A)
    rates = {id(p): _base_learning_rate(group) for group in optimizer.param_groups for p in group["params"]}
    targets, alone = [], set()
    for parameter in rates:
        if parameter in owners:
            layer, adapter, lora_B, lora_A = owners[parameter]
            if not (id(lora_A) in rates and id(lora_B) in rates):
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
        for target in targets:
            check_state(optimizer, target.lora_A)
        return _rescale(targets, OptimizerState.of(optimizer))
    targets = [
        Target(layer, adapter, *layer.factors(adapter), None, None)
        for layer in layers
        for adapter in layer.scalora_config
        if all(factor.requires_grad for factor in layer.factors(adapter))
    ]
    return _rescale(targets, OptimizerState.of(None))


@torch.no_grad()
def _rescale(targets: list[Target], optimizer: OptimizerState) -> RescaleReport:
    """Rescale targets, through whole copies of their factors where these are sharded."""
    sharded = {is_sharded(target.lora_A) for target in targets}
    if len(sharded) == 2:
        raise TypeError(
            "ScaLoRA cannot rescale adapters of which some are sharded and some are not: shard all of them."
        )
    ready = [target for target in targets if has_gradients(target.lora_B, target.lora_A)]
    report = RescaleReport(without_gradient=len(targets) - len(ready))
    if True not in sharded:
        _rescale_whole(ready, optimizer, report)
        return report
    factors, optimizer = assemble((p for target in ready for p in (target.lora_B, target.lora_A)), optimizer)
    whole = [
        replace(target, lora_B=lora_B.whole, lora_A=lora_A.whole)
        for target, lora_B, lora_A in zip(ready, factors[::2], factors[1::2])
    ]
    _rescale_whole(whole, optimizer, report)
    for factor in factors:
        factor.write()
    return report


def _rescale_whole(targets: list[Target], optimizer: OptimizerState, report: RescaleReport) -> None:
    by_shape = defaultdict(list)
    for target in targets:
        if target.lora_A.dim() < 2:
            raise TypeError("ScaLoRA cannot rescale flattened parameters (FSDP1): use FSDP2 (fsdp_version: 2), or DDP.")
        if target.lora_B.grad.is_sparse or target.lora_A.grad.is_sparse:
            raise ValueError("ScaLoRA needs dense gradients: do not target nn.Embedding(sparse=True).")
        by_shape[target.group_key(optimizer)].append(target)
    groups = [ShapeGroup(group) for group in by_shape.values()]
    solve(groups, optimizer, report)
    for group in groups:
        group.fold(report)
    accumulate(groups, report)
    for group in groups:
        group.carry(optimizer)
    check_ranks(
        (f"{name} of layer {i}", tensor) for i, t in enumerate(targets) for name, tensor in t.rescaled_tensors().items()
    )


_warned: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
_reports: weakref.WeakKeyDictionary[torch.optim.Optimizer, RescaleReport] = weakref.WeakKeyDictionary()


def last_report(optimizer: torch.optim.Optimizer) -> RescaleReport | None:
    """The report of the latest automatic rescaling before a step of `optimizer`; None before the first."""
    return _reports.get(getattr(optimizer, "optimizer", optimizer))


def _due(targets: list[Target]) -> list[Target]:
    """Count a step of each target; those whose interval is over."""
    due = []
    for target in targets:
        progress = target.layer.progress(target.adapter)
        # Engines send the factors of rank 0 to all ranks, which made adapters of their own, with their own norms.
        if progress.steps == 0 and dist.is_available() and dist.is_initialized():
            target.layer.take_initial_norm(target.adapter, whole_value(target.lora_B), whole_value(target.lora_A))
        progress.steps += 1
        if progress.steps % target.layer.scalora_config[target.adapter].scaling_interval == 0:
            due.append(target)
    return due


def _before_step(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """Runs before every step of every torch optimizer; where a closure computes the gradients, has it run after it."""
    if not LAYERS or _is_wrapper(optimizer) or _is_within_own_step(optimizer):
        return None
    if not getattr(optimizer, "begins_outer_step", True):  # GaussNewton's other steps leave the weights alone
        return None
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if not callable(closure):
        _count_step(optimizer)
        return None

    def closure_and_count():
        loss = closure()
        _count_step(optimizer)
        return loss

    if "closure" in kwargs:
        return args, kwargs | {"closure": closure_and_count}
    return (args[0], closure_and_count, *args[2:]), kwargs


def _is_wrapper(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it steps another optimizer, which holds the state and runs this hook again."""
    inside = any(isinstance(value, torch.optim.Optimizer) for value in vars(optimizer).values())
    return inside and not rule_for(optimizer) and not any(optimizer.state.values())


def _is_within_own_step(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step of it is running already: one that calls its base class's step runs this hook twice."""
    frame, running = sys._getframe(), 0
    while frame is not None:
        if frame.f_code is STEP_CODE and frame.f_locals["args"][0] is optimizer:
            running += 1
        frame = frame.f_back
    return running > 1


def _count_step(optimizer: torch.optim.Optimizer) -> None:
    """Count a step of its adapters that have gradients, and rescale those whose interval is over."""
    targets = _targets_of(optimizer)
    if not targets:
        install_deepspeed_hook()  # the optimizer may be stepping a flat partition of all parameters
    for target in targets:
        check_state(optimizer, target.lora_A)
    due = _due([target for target in targets if has_gradients(target.lora_B, target.lora_A)])
    if due:
        _reports[optimizer] = _rescale(due, OptimizerState.of(optimizer))


def before_zero_step(engine) -> None:
    """Runs before every optimizer step of a DeepSpeed engine."""
    layers = [module for module in engine.module.modules() if isinstance(module, ScaLoRALayer)]
    factors = [(layer, adapter, *layer.factors(adapter)) for layer in layers for adapter in layer.scalora_config]
    factors = [found for found in factors if is_zero(found[-1])]
    if not factors:
        return
    base = engine.optimizer.optimizer
    rates = {float(_base_learning_rate(group)) for group in base.param_groups}
    rate = rates.pop() if len(rates) == 1 else None  # whose the flat partitions are is not known
    check_state(base, next(iter(base.state), None))
    # Before the first step there is no state, and asking for it would hang the ranks that do not hold the parameter.
    held = {name for state in base.state.values() for name in state} if engine.global_steps else ()
    rule = {name: power for name, power in rule_for(base).items() if name in held}
    due = _due([Target(*found, rate, rate) for found in factors])
    if due:
        _reports[base] = _rescale(due, OptimizerState(rule, {}))


def install_hook() -> None:
    """Make torch's optimizers rescale on their own; once per process."""
    register_optimizer_step_pre_hook(_before_step)


def install_deepspeed_hook() -> None:
    """The same for DeepSpeed's engines, where DeepSpeed has been imported."""
    if "deepspeed" in sys.modules:
        wire_deepspeed(before_zero_step)
