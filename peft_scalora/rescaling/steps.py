"""Counting an optimizer's steps of ScaLoRA adapters, and rescaling those whose interval is over."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from operator import is_
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from ..layer import LAYERS, ScaLoRALayer
from .copies import check_copies
from .engine import base_learning_rate, inner_optimizers, rescale_targets, targets_of
from .history import note_step
from .moments import OptimizerState, check_state
from .report import RescaleReport
from .shape_group import Target
from .sharding import has_gradients, whole_value

_plans: weakref.WeakKeyDictionary[torch.optim.Optimizer, _Plan] = weakref.WeakKeyDictionary()
_reports: weakref.WeakKeyDictionary[torch.optim.Optimizer, RescaleReport] = weakref.WeakKeyDictionary()


def last_report(optimizer: torch.optim.Optimizer) -> RescaleReport | None:
    """Return the report of the latest rescaling before a step of `optimizer`; None before the first.

    Args:
        optimizer: one that steps ScaLoRA adapters, or one that holds such an optimizer.
    """
    reports = (_reports.get(each) for each in (optimizer, *inner_optimizers(optimizer)))
    return next((report for report in reports if report is not None), None)


def rescale_due(targets: list[Target], state: OptimizerState, optimizer: torch.optim.Optimizer) -> None:
    """Rescale targets whose interval is over, and keep the report for `last_report`."""
    report = RescaleReport()
    rescale_targets(targets, state, report)
    _reports[optimizer] = report


def is_due(layer: ScaLoRALayer, adapter: str, lora_B: nn.Parameter, lora_A: nn.Parameter) -> bool:
    """Count a step of one adapter in one layer; tell whether its interval is over."""
    progress = layer.progress(adapter)
    steps = progress.steps + 1
    # Engines send the factors of rank 0 to all ranks, which made adapters of their own, with their own norms.
    if steps == 1 and dist.is_available() and dist.is_initialized():
        layer.take_initial_norm(adapter, whole_value(lora_B), whole_value(lora_A))
    progress.steps = steps
    return steps % layer.scalora_config[adapter].scaling_interval == 0


def count_step(optimizer: torch.optim.Optimizer) -> bool:
    """Count a step of the optimizer's adapters that have gradients, and rescale those whose interval is over.

    Returns:
        whether the optimizer steps any adapter.
    """
    plan = _plans.get(optimizer)
    if plan is None or not plan.is_current(optimizer):
        plan = _plans[optimizer] = _Plan(optimizer)
    if not plan.stepped:
        return False
    plan.check_states(optimizer)
    plan.note_step()
    due = []
    for stepped in plan.stepped:
        reference, adapter, lora_B, lora_A = stepped
        layer = reference()
        if layer is not None and has_gradients(lora_B, lora_A) and is_due(layer, adapter, lora_B, lora_A):
            due.append(stepped)
    if due:
        rescale_due(_targets(due, optimizer), OptimizerState.of(optimizer), optimizer)
    return True


def _targets(due: list[_Stepped], optimizer: torch.optim.Optimizer) -> list[Target]:
    """Return what is to be rescaled, with its learning rates; refuse state and copies that cannot be carried along."""
    check_state(optimizer, *(stepped.lora_A for stepped in due))
    check_copies(optimizer, [p for stepped in due for p in (stepped.lora_B, stepped.lora_A)])
    rates = {id(p): base_learning_rate(group) for group in optimizer.param_groups for p in group["params"]}
    return [Target(layer(), adapter, B, A, rates[id(B)], rates[id(A)]) for layer, adapter, B, A in due]


class _Stepped(NamedTuple):
    """Adapter in one layer, of which an optimizer steps both factors."""

    layer: weakref.ref[ScaLoRALayer]
    adapter: str
    lora_B: nn.Parameter
    lora_A: nn.Parameter


class _Plan:
    """Adapters that an optimizer steps, found once for as long as layers, adapters and parameters are the same.

    It keeps no layer alive, since it lives as long as the optimizer.
    """

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.version = LAYERS.version
        self.parameters = [weakref.ref(p) for p in _parameters(optimizer)]
        targets = targets_of(optimizer)
        self.stepped = [_Stepped(weakref.ref(t.layer), t.adapter, t.lora_B, t.lora_A) for t in targets]
        self.noted = {each.adapter: each for each in self.stepped}  # one layer of each adapter
        self.places = [place for t in targets for p in (t.lora_B, t.lora_A) for place in _places(t.layer, p)]
        self.states = 0  # parameters that had state when it was last checked
        if targets:
            check_copies(optimizer, [p for t in targets for p in (t.lora_B, t.lora_A)])

    def is_current(self, optimizer: torch.optim.Optimizer) -> bool:
        """Tell whether the plan is still right: engines that shard replace parameters, loading may as well."""
        parameters = _parameters(optimizer)
        if self.version is not LAYERS.version or len(self.parameters) != len(parameters):
            return False
        known = [reference() for reference in self.parameters]
        return all(map(is_, known, parameters)) and all(held.get(key) is value for held, key, value in self.places)

    def note_step(self) -> None:
        """Remember a few numbers of each adapter's factors, by which putting them back is noticed."""
        for reference, adapter, lora_B, lora_A in self.noted.values():
            if (layer := reference()) is not None:
                note_step(layer, adapter, (lora_B, lora_A))

    def check_states(self, optimizer: torch.optim.Optimizer) -> None:
        """Refuse unknown state: of the first adapter in every step, of all when more parameters have state."""
        stepped = self.stepped if len(optimizer.state) != self.states else self.stepped[:1]
        check_state(optimizer, *(each.lora_A for each in stepped))
        self.states = len(optimizer.state)


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _places(layer: ScaLoRALayer, parameter: nn.Parameter) -> Iterator[tuple[dict, str, Any]]:
    """Yield where a layer keeps a parameter, as (dictionary, key, value) of every level below the layer's own."""
    path = next((name for name, p in layer.named_parameters(remove_duplicate=False) if p is parameter), None)
    if path is None:
        return
    *modules, name = path.split(".")
    module: nn.Module = layer
    for key in modules:
        if module is not layer:
            yield module._modules, key, module._modules[key]
        module = module._modules[key]
    yield module._parameters, name, parameter
