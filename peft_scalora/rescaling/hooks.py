"""When a rescaling happens: before the steps of torch's optimizers, on its own or in classes that say so."""

from __future__ import annotations

import functools
import sys
import threading
from importlib import import_module
from operator import attrgetter
from types import FrameType
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from .._seams import STEP_CODE
from ..layer import LAYERS, ScaLoRALayer
from ..live import made_once
from .engine import base_learning_rate
from .moments import OptimizerState, check_state, rule_for
from .shape_group import Target
from .sharding import is_zero, wire_deepspeed
from .steps import Stepped, count_step, is_due, rescale_due

_EXPLICIT = "with_rescaling:"

_is_automatic = True
_wiring = threading.Lock()


class automatic_rescaling:
    """Switch the rescaling of all torch optimizers of this process on or off, as a call or for a `with` block.

        automatic_rescaling(False)  # from here on

        with automatic_rescaling(False):  # in the block alone
            ...

    While it is off, steps are not counted, and adapters train as plain LoRA unless `rescale` is called or their
    optimizer is made by `with_rescaling`. Saving an adapter that was trained and never rescaled warns as always.

    Args:
        enabled: True, as it is at the start, or False.

    Raises:
        TypeError: enabled is not a bool.
    """

    def __init__(self, enabled: bool):
        if not isinstance(enabled, bool):
            raise TypeError(f"automatic_rescaling: enabled={enabled!r} is not a bool. Pass True or False.")
        global _is_automatic
        self._before = _is_automatic
        _is_automatic = enabled

    def __enter__(self) -> None:
        return None

    def __exit__(self, *exception) -> None:
        global _is_automatic
        _is_automatic = self._before


@made_once
def with_rescaling(optimizer_cls: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """Return a subclass of an optimizer class whose `step` rescales the ScaLoRA adapters that it steps.

    The hook on all optimizers leaves such a class alone. It rescales with `automatic_rescaling(False)` too.

        optimizer = with_rescaling(torch.optim.AdamW)(model.parameters(), lr=1e-4)

    Args:
        optimizer_cls: the class to derive from. A class that rescales already is returned as it is.

    Raises:
        TypeError: it is no subclass of torch.optim.Optimizer.
    """
    if not (isinstance(optimizer_cls, type) and issubclass(optimizer_cls, torch.optim.Optimizer)):
        raise TypeError(
            f"with_rescaling: {optimizer_cls!r} is no subclass of torch.optim.Optimizer. Call "
            "peft_scalora.rescale(model, optimizer) before each of its steps."
        )
    if getattr(optimizer_cls, "rescales_itself", False):
        return optimizer_cls
    # Without the wrapper in which torch runs hooks: it puts one around the new step.
    step_of_base = optimizer_cls.step.__wrapped__ if hasattr(optimizer_cls.step, "hooked") else optimizer_cls.step

    @functools.wraps(step_of_base)
    def step(self, *args, **kwargs):
        changed = _rescale_before(self, (self, *args), kwargs)
        args, kwargs = changed or ((self, *args), kwargs)
        return step_of_base(*args, **kwargs)

    # Pickled by a name from which `__getattr__` below makes the class again.
    path = f"{optimizer_cls.__module__}:{optimizer_cls.__qualname__}".replace(".", "/")
    names: dict[str, Any] = {"__module__": __name__, "__qualname__": _EXPLICIT + path}
    names |= {"__doc__": optimizer_cls.__doc__, "rescales_itself": True, "step": step}
    return type(f"{optimizer_cls.__name__}WithRescaling", (optimizer_cls,), names)


def __getattr__(name: str) -> type[torch.optim.Optimizer]:
    """Make a class of `with_rescaling` by its name, for unpickling."""
    module, _, optimizer_cls = name.removeprefix(_EXPLICIT).replace("/", ".").partition(":")
    if not (name.startswith(_EXPLICIT) and optimizer_cls):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return with_rescaling(attrgetter(optimizer_cls)(import_module(module)))


def _rescale_before(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """Count a step that is about to be taken; return its arguments where they change.

    Where a closure computes the gradients, the step is counted after its first call. Later calls in the same step, as
    LBFGS or SAM make them, are at other weights, which the optimizer compares with those of the first.
    """
    if not getattr(optimizer, "begins_outer_step", True):  # GaussNewton's other steps leave the weights alone
        return None
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if not callable(closure):
        _count(optimizer)
        return None
    is_counted = False

    def closure_and_count():
        nonlocal is_counted
        loss = closure()
        if not is_counted:
            is_counted = True
            _count(optimizer)
        return loss

    if "closure" in kwargs:
        return args, kwargs | {"closure": closure_and_count}
    return (args[0], closure_and_count, *args[2:]), kwargs


def _count(optimizer: torch.optim.Optimizer) -> None:
    if not count_step(optimizer):
        install_deepspeed_hook()  # the optimizer may be stepping a flat partition of all parameters


def before_step(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """Run before every step of every torch optimizer in the process."""
    if not _is_automatic or not LAYERS or getattr(optimizer, "rescales_itself", False):
        return None
    return None if _is_within_own_step(optimizer) else _rescale_before(optimizer, args, kwargs)


def _is_within_own_step(optimizer: torch.optim.Optimizer) -> bool:
    """Tell whether a step of the optimizer is running already.

    torch wraps `step` of a class when it makes the first optimizer of it. A class that calls its base class's step so
    runs the hooks twice in a step, once a class of both kinds has been used. Nothing in a hook's arguments tells the
    second run from the first. A mark set before a step and cleared after it does not either: post-hooks do not run when
    a step raises, and an object that clears it when the step's frame dies waits for as long as somebody keeps the
    traceback. So the running steps are counted on the stack, by the code of torch's wrapper. The walk is left out for
    an optimizer of whose classes one alone is wrapped.
    """
    if sum(hasattr(vars(cls).get("step"), "hooked") for cls in type(optimizer).__mro__) < 2:
        return False
    frame: FrameType | None = sys._getframe()
    running = 0
    while frame is not None:
        if frame.f_code is STEP_CODE and frame.f_locals["args"][0] is optimizer:
            running += 1
        frame = frame.f_back
    return running > 1


def before_zero_step(engine: Any) -> None:
    """Run before every optimizer step of a DeepSpeed engine."""
    if not _is_automatic:
        return
    layers = [module for module in engine.module.modules() if isinstance(module, ScaLoRALayer)]
    factors = [(layer, adapter, *layer.factors(adapter)) for layer in layers for adapter in layer.scalora_config]
    factors = [found for found in factors if is_zero(found[-1])]
    if not factors:
        return
    base = engine.optimizer.optimizer
    rates = {float(base_learning_rate(group)) for group in base.param_groups}
    rate = rates.pop() if len(rates) == 1 else None  # whose the flat partitions are is not known
    check_state(base, next(iter(base.state), None))
    # Before the first step there is no state, and asking for it would hang the ranks that do not hold the parameter.
    held = {name for state in base.state.values() for name in state} if engine.global_steps else ()
    rule = {name: power for name, power in rule_for(base).items() if name in held}
    due = [Target(*found, rate, rate) for found in factors if is_due(Stepped.of(*found))]
    if due:
        rescale_due(due, OptimizerState(rule, {}), base)


def install_hook() -> None:
    """Make torch's optimizers rescale on their own; once per process."""
    register_optimizer_step_pre_hook(before_step)


def install_deepspeed_hook() -> None:
    """Make DeepSpeed's engines rescale on their own, where DeepSpeed has been imported."""
    if "deepspeed" in sys.modules:
        with _wiring:
            wire_deepspeed(before_zero_step)
