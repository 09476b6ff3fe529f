"""Copies of parameters that a wrapper keeps beside an optimizer's state: a rescaling would make them something else.

Rescaling writes the same function in other factors. Lookahead's slow weights, for one, are factors of before: to
interpolate between the two means nothing. A wrapper need not run torch's hooks, nor keep what it copies in `state`. But
it is on the stack while it steps the optimizer, so that is where it is found.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from .moments import TEMPORARY_STATES


def check_copies(optimizer: torch.optim.Optimizer, params: list[Tensor]) -> None:
    """Refuse a wrapper that is stepping the optimizer and keeps tensors shaped like `params`.

    Left out are the parameters themselves, their gradients, the optimizer's state, for which there are rules, and what
    is written anew in every step.

    Raises:
        TypeError: names the wrapper and the attribute or state.
    """
    shapes = {param.shape for param in params}
    for holder in _wrappers_on_the_stack(optimizer):
        found = [(name, tensor) for name, tensor in _kept_by(holder, optimizer) if tensor.shape in shapes]
        known = {_address(tensor) for tensor in _known(optimizer)} if found else set()
        names = {name: None for name, tensor in found if _address(tensor) not in known}
        if names:
            raise TypeError(
                f"ScaLoRA cannot rescale under {type(holder).__name__}, which keeps {', '.join(map(repr, names))}: "
                "copies of the factors or sums over their steps, which stand for another function once the factors are "
                "rescaled. Train without it, or use a scaling_interval longer than the training to keep plain LoRA."
            )


def _wrappers_on_the_stack(optimizer: torch.optim.Optimizer) -> list[Any]:
    """Return the objects with parameter groups of which a method is running, but for the optimizer."""
    found: list[Any] = []
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        code = frame.f_code
        if code.co_argcount and code.co_varnames[0] == "self":
            holder = frame.f_locals.get("self")
            if holder is not optimizer and isinstance(getattr(holder, "param_groups", None), list):
                found += [holder] if all(holder is not known for known in found) else []
        frame = frame.f_back
    return found


def _kept_by(holder: Any, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    """Yield what the holder keeps in attributes, parameter groups and a state of its own, with the names of it."""
    for name, value in vars(holder).items():
        if value is not optimizer.state:
            yield from _tensors(name, value)


def _tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in a value of plain containers, each with the innermost name on the way to it."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            inner_name = key if isinstance(key, str) else name
            if inner_name != "params" and inner_name not in TEMPORARY_STATES:
                yield from _tensors(inner_name, inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _tensors(name, inner)


def _known(optimizer: torch.optim.Optimizer) -> Iterable[Tensor]:
    """Yield all that the optimizer steps, with gradients and state."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            yield param
            if param.grad is not None:
                yield param.grad
    for _, tensor in _tensors("state", optimizer.state):
        yield tensor


def _address(tensor: Tensor) -> int:
    """Return where a tensor's values begin, of a sharded one this process's."""
    return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).data_ptr()
