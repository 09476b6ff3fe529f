"""Counting an optimizer's steps of ScaLoRA adapters, and rescaling those whose interval is over."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from operator import is_
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from ..config import ScaLoRAConfig
from ..held import STEPS, HostHeld
from ..layer import LAYERS, ScaLoRALayer
from .copies import check_copies
from .engine import base_learning_rates, inner_optimizers, rescale_targets, targets_of
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


def is_due(stepped: Stepped) -> bool:
    """Count a step of one adapter in one layer; tell whether its interval is over."""
    numbers = stepped.held.numbers
    numbers[STEPS] += 1
    # Engines send the factors of rank 0 to all ranks, which made adapters of their own, with their own norms.
    if numbers[STEPS] == 1 and dist.is_available() and dist.is_initialized():
        factors = whole_value(stepped.lora_B), whole_value(stepped.lora_A)
        stepped.layer().take_initial_norm(stepped.adapter, *factors)
    return numbers[STEPS] % stepped.config.scaling_interval == 0


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
    due = plan.count()
    if due and not plan.is_in_place():
        plan.take_back()
        plan = _plans[optimizer] = _Plan(optimizer)
        due = plan.count()
    if due:
        rescale_due(_targets(due, optimizer), OptimizerState.of(optimizer), optimizer)
    return True


def _targets(due: list[Stepped], optimizer: torch.optim.Optimizer) -> list[Target]:
    """Return what is to be rescaled, with its learning rates; refuse state and copies that cannot be carried along."""
    check_state(optimizer, *(stepped.lora_A for stepped in due))
    check_copies(optimizer, [p for stepped in due for p in (stepped.lora_B, stepped.lora_A)])
    rates = base_learning_rates(optimizer)
    return [Target(each.layer(), *each[1:4], rates[id(each.lora_B)], rates[id(each.lora_A)]) for each in due]


class Stepped(NamedTuple):
    """Adapter in one layer, of which an optimizer steps both factors."""

    layer: Callable[[], Any]  # a weak reference to a ScaLoRALayer
    adapter: str
    lora_B: nn.Parameter
    lora_A: nn.Parameter
    held: HostHeld  # its counts
    config: ScaLoRAConfig

    @classmethod
    def of(cls, layer: ScaLoRALayer, adapter: str, lora_B: nn.Parameter, lora_A: nn.Parameter) -> Stepped:
        """Return an adapter's factors in a layer with what counting its steps needs."""
        held = layer.scalora_progress.get_submodule(adapter)
        return cls(weakref.ref(layer), adapter, lora_B, lora_A, held, layer.scalora_config[adapter])


class _Plan:
    """Adapters that an optimizer steps, found once for as long as layers, adapters and parameters are the same.

    It keeps no layer alive, since it lives as long as the optimizer. Models have hundreds of layers: every operation on
    a layer that a step takes here counts.
    """

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.version = LAYERS.version
        self.sizes, self.ends = _groups(optimizer)
        targets = targets_of(optimizer)
        self.stepped = [Stepped.of(t.layer, t.adapter, t.lora_B, t.lora_A) for t in targets]
        self.noted = {each.adapter: each for each in self.stepped}  # one layer of each adapter
        self.counts = [(t.layer.scalora_progress._modules, t.adapter) for t in targets]
        self.places = [place for target in targets for place in _places(target)]
        self.states = 0  # parameters that had state when it was last checked
        if targets:
            check_copies(optimizer, [p for t in targets for p in (t.lora_B, t.lora_A)])

    def is_current(self, optimizer: torch.optim.Optimizer) -> bool:
        """Tell whether the optimizer steps the same as before. Engines that shard replace all of its parameters."""
        sizes, ends = _groups(optimizer)
        if self.version is not LAYERS.version or sizes != self.sizes or not all(map(is_, ends, self.ends)):
            return False
        return all(held.get(adapter) is each.held for (held, adapter), each in zip(self.counts, self.stepped))

    def is_in_place(self) -> bool:
        """Tell whether the layers still hold what is stepped; loading may have replaced it."""
        return all(held.get(key) is value for held, key, value in self.places)

    def count(self) -> list[Stepped]:
        """Count a step of all adapters that have gradients; return those whose interval is over."""
        return [each for each in self.stepped if has_gradients(each.lora_B, each.lora_A) and is_due(each)]

    def take_back(self) -> None:
        """Take back the step that was counted last."""
        for each in self.stepped:
            if has_gradients(each.lora_B, each.lora_A):
                each.held.numbers[STEPS] -= 1

    def note_step(self) -> None:
        """Remember a few numbers of each adapter's factors, by which putting them back is noticed."""
        for each in self.noted.values():
            if (layer := each.layer()) is not None:
                note_step(layer, each.adapter, (each.lora_B, each.lora_A))

    def check_states(self, optimizer: torch.optim.Optimizer) -> None:
        """Refuse unknown state: of the first adapter in every step, of all when more parameters have state."""
        stepped = self.stepped if len(optimizer.state) != self.states else self.stepped[:1]
        check_state(optimizer, *(each.lora_A for each in stepped))
        self.states = len(optimizer.state)


def _groups(optimizer: torch.optim.Optimizer) -> tuple[list[int], list[nn.Parameter]]:
    """Return how many parameters each group has, and the first and the last one of each."""
    groups = [group["params"] for group in optimizer.param_groups if group["params"]]
    return [len(group) for group in groups], [end for group in groups for end in (group[0], group[-1])]


def _places(target: Target) -> Iterator[tuple[dict, str, Any]]:
    """Yield where a layer keeps the factors and their settings, as (dictionary, key, value), below its own level."""
    yield target.layer.scalora_config, target.adapter, target.layer.scalora_config[target.adapter]
    for parameter in (target.lora_B, target.lora_A):
        yield from _places_of(parameter, target.layer)


def _places_of(parameter: nn.Parameter, layer: ScaLoRALayer) -> Iterator[tuple[dict, str, Any]]:
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
