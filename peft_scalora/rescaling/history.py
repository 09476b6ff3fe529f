"""Noticing factors that were put back from an earlier time under the change accumulated since.

Best weights are often kept as copies of the trained parameters, which do not hold the accumulated change. So a few
numbers of one layer's factors are kept for each step, with the count of rescalings that they belong to. Nothing here
waits for an accelerator until an adapter is saved.
"""

from __future__ import annotations

import warnings
import weakref

import torch
from torch import Tensor

from ..layer import ScaLoRALayer
from .sharding import is_zero

STEPS = 4096  # which are remembered
_NUMBERS = 4  # of each factor

_histories: weakref.WeakKeyDictionary[ScaLoRALayer, dict[str, History]] = weakref.WeakKeyDictionary()


class History:
    """What a few numbers of an adapter's factors were before each of the latest steps."""

    def __init__(self, sample: Tensor):
        self.samples = sample.new_full((STEPS, len(sample)), torch.nan)
        self.rescalings = torch.full((STEPS,), -1, dtype=torch.int64, device=sample.device)
        self.steps = 0
        self.was_put_back = torch.zeros((), dtype=torch.bool, device=sample.device)

    def look(self, sample: Tensor, rescalings: int) -> None:
        """Notice whether these are the factors of an earlier step, and of another count of rescalings."""
        if self.steps:
            is_same = (self.samples == sample).all(1)
            belongs = (is_same & (self.rescalings == rescalings)).any() | is_same[(self.steps - 1) % STEPS]
            self.was_put_back |= is_same.any() & ~belongs

    def note(self, sample: Tensor, rescalings: int) -> None:
        """Remember the factors before a step."""
        self.look(sample, rescalings)
        self.samples[self.steps % STEPS] = sample
        self.rescalings[self.steps % STEPS] = rescalings
        self.steps += 1


def note_step(layer: ScaLoRALayer, adapter: str) -> None:
    """Remember the factors of an adapter's layer before an optimizer's step; where it costs no wait, report."""
    sample = _sample(layer, adapter)
    if sample is None:
        return
    histories = _histories.setdefault(layer, {})
    history = histories.get(adapter)
    if history is None or history.samples.shape[1:] != sample.shape or history.samples.device != sample.device:
        history = histories[adapter] = History(sample)
    history.note(sample, layer.progress(adapter).rescalings)
    if sample.device.type == "cpu":
        _report(history, adapter)


def check_history(layer: ScaLoRALayer, adapter: str) -> None:
    """Warn if factors of the layer were put back under an accumulated change of another time."""
    history = _histories.get(layer, {}).get(adapter)
    sample = _sample(layer, adapter)
    if history is not None and sample is not None and history.samples.shape[1:] == sample.shape:
        history.look(sample.to(history.samples.device), layer.progress(adapter).rescalings)
        _report(history, adapter)


def _report(history: History, adapter: str) -> None:
    if history.was_put_back:
        history.was_put_back.zero_()
        warnings.warn(
            f"The factors of adapter {adapter!r} are those of an earlier step, but the change accumulated beside them "
            "is not: copies of the trained parameters do not hold it. To keep and put back an adapter, copy "
            "get_peft_model_state_dict(model) and give it to set_peft_model_state_dict, or save and load it."
        )


def _sample(layer: ScaLoRALayer, adapter: str) -> Tensor | None:
    """Return a few numbers of both factors; None where this process holds none."""
    parts = []
    for factor in layer.factors(adapter):
        if is_zero(factor) or factor.is_meta:
            return None
        flat = factor.detach()
        flat = (flat.to_local() if hasattr(flat, "to_local") else flat).flatten()
        parts.append(flat[:: max(1, flat.numel() // _NUMBERS)][:_NUMBERS].float())
    return torch.cat(parts) if sum(len(part) for part in parts) else None
