"""Noticing factors that were put back from an earlier time under the change accumulated since.

Best weights are often kept as copies of the trained parameters, which do not hold the accumulated change. So a few
numbers of one layer's factors are kept for each step, with the count of rescalings that they belong to. On an
accelerator they are read when an adapter is saved, on the CPU at every step.
"""

from __future__ import annotations

import warnings
import weakref
from collections import deque

import torch
from torch import Tensor

from ..layer import ScaLoRALayer
from .sharding import is_zero

STEPS = 4096  # which are remembered
_NUMBERS = 4  # of each factor

_histories: weakref.WeakKeyDictionary[ScaLoRALayer, dict[str, History]] = weakref.WeakKeyDictionary()


class History:
    """Samples of an adapter's factors before each of the latest steps."""

    def __init__(self):
        self.unread: deque[tuple[Tensor, int]] = deque(maxlen=STEPS)
        self.rescalings: dict[tuple[float, ...], int] = {}  # that the numbers belong to, the latest step last
        self.latest: tuple[float, ...] | None = None

    def note(self, sample: Tensor, rescalings: int) -> None:
        """Remember the factors as they are before a step, or when they are saved."""
        self.unread.append((sample, rescalings))

    def was_put_back(self) -> bool:
        """Read what was noted since the last call; tell whether it went back to factors of other rescalings."""
        found = False
        for numbers, rescalings in [(tuple(sample.tolist()), count) for sample, count in self.unread]:
            if numbers != self.latest:
                found |= self.rescalings.pop(numbers, rescalings) != rescalings
                self.rescalings[numbers] = rescalings
                self.latest = numbers
        self.unread.clear()
        while len(self.rescalings) > STEPS:
            del self.rescalings[next(iter(self.rescalings))]
        return found


def note_step(layer: ScaLoRALayer, adapter: str, factors: tuple[Tensor, Tensor]) -> None:
    """Remember the factors of an adapter's layer before an optimizer's step."""
    sample = _sample(factors)
    if sample is None:
        return
    history = _histories.setdefault(layer, {}).setdefault(adapter, History())
    history.note(sample, layer.progress(adapter).rescalings)
    if sample.device.type == "cpu":
        _report(history, adapter)


def check_history(layer: ScaLoRALayer, adapter: str) -> None:
    """Warn if factors of the layer were put back under an accumulated change of another time."""
    history = _histories.get(layer, {}).get(adapter)
    sample = _sample(layer.factors(adapter))
    if history is not None and sample is not None:
        history.note(sample, layer.progress(adapter).rescalings)
        _report(history, adapter)


def _report(history: History, adapter: str) -> None:
    if history.was_put_back():
        warnings.warn(
            f"The factors of adapter {adapter!r} are those of an earlier step, but the change accumulated beside them "
            "is not: copies of the trained parameters do not hold it. To keep and put back an adapter, copy "
            "get_peft_model_state_dict(model) and give it to set_peft_model_state_dict, or save and load it."
        )


def _sample(factors: tuple[Tensor, Tensor]) -> Tensor | None:
    """Return a few numbers of both factors; None where this process holds none."""
    parts = []
    for factor in factors:
        if is_zero(factor) or factor.is_meta:
            return None
        flat = factor.detach()
        flat = (flat.to_local() if hasattr(flat, "to_local") else flat).flatten()
        parts.append(flat[:: max(1, flat.numel() // _NUMBERS)][:_NUMBERS].float())
    return torch.cat(parts) if any(len(part) for part in parts) else None
