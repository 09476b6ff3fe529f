"""Measure unclipped gradients, overall and by layer group, and clip at a percentile of their norms."""

from __future__ import annotations

import json
import math
import os
from bisect import insort
from collections.abc import Iterable, Sequence

import torch
from torch import nn
from torch.distributed.tensor import DTensor

CLIPPED_TOO_OFTEN = 0.5  # share of the updates above which the playbook lowers the learning rate instead
_JUDGED_AFTER = 20  # updates: before that a share says little
_WRAPPERS = ("module.", "_orig_mod.", "base_model.model.")


def layer_group(name: str) -> str:
    """Name the layer of a parameter: its path up to the first number ("transformer.h.3"), else its module's path."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "", 1) if name.startswith(wrapper) else name
    parts = name.split(".")
    for position, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: position + 1])
    return ".".join(parts[:-1]) or name


def gradient_norms(parameters: Iterable[tuple[str, nn.Parameter]]) -> tuple[float, dict[str, float]]:
    """Return the L2 norm of all gradients, and of those of each layer group.

    Computed in float32 whatever the gradients' dtype.

    Parameters without a gradient are left out. Sharded gradients (FSDP2) are reduced over all ranks. One transfer from
    the device, however many groups there are.

    Returns:
        the norm, and the norm of each group that has a gradient; both empty (nan) without any gradient.
    """
    names = []
    norms = []
    for name, parameter in parameters:
        if parameter.grad is not None:
            norm = torch.linalg.vector_norm(parameter.grad.detach(), dtype=torch.float32)
            norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
            names.append(layer_group(name))
    if not norms:
        return math.nan, {}
    device = norms[0].device
    squares = torch.stack([norm.to(device) for norm in norms]).double().square()
    groups = list(dict.fromkeys(names))
    index = torch.tensor([groups.index(name) for name in names], device=device)
    by_group = torch.zeros(len(groups), dtype=torch.float64, device=device).index_add(0, index, squares)
    total, *each = torch.cat([by_group.sum()[None], by_group]).sqrt().tolist()
    return total, dict(zip(groups, each))


def clip(parameters: Iterable[nn.Parameter], norm: float, threshold: float) -> bool:
    """Scale g ← λ g / |g| in place if |g| > λ (the threshold), and return whether it was.

    Gradients with a norm that is not finite are left as they are.
    """
    if not (math.isfinite(norm) and norm > threshold):
        return False
    torch.nn.utils.clip_grads_with_norm_(parameters, threshold, torch.tensor(norm))
    return True


def percentile(ordered: Sequence[float], q: float) -> float:
    """Return the q-th percentile of ascending numbers, with linear interpolation as in numpy.percentile."""
    position = q / 100 * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


class PercentileThreshold:
    """Choose the clipping threshold λ: a percentile of earlier unclipped norms, once there are `burn_in` of them.

    Args:
        q: the percentile; None keeps `initial` for good.
        burn_in: how many norms, of those that are finite and not 0, have to be known.
        initial: λ until then; None clips nothing.
        calibration: norms of another run, to take a constant λ from instead.
    """

    def __init__(
        self, q: float | None, burn_in: int, initial: float | None = None, calibration: Sequence[float] | None = None
    ):
        self.q = q
        self.burn_in = burn_in
        self.initial = initial
        self._constant = None if calibration is None else percentile(_updates(calibration), q)
        self._ordered: list[float] = []

    @property
    def adapted(self) -> bool:
        """Return True if λ is a percentile and not the initial one."""
        return self._constant is not None or (self.q is not None and len(self._ordered) >= self.burn_in)

    def value(self) -> float | None:
        """Return λ for the next step."""
        if self._constant is not None:
            return self._constant
        return percentile(self._ordered, self.q) if self.adapted else self.initial

    def add(self, norm: float) -> None:
        """Take the norm of one step. A norm of 0, or one that is not finite, is no update and is left out."""
        if _is_update(norm):
            insort(self._ordered, norm)


def _is_update(norm: float) -> bool:
    return math.isfinite(norm) and norm > 0


def _updates(norms: Sequence[float]) -> list[float]:
    updates = sorted(filter(_is_update, norms))
    if not updates:
        raise ValueError("calibration holds no finite gradient norm above 0.")
    return updates


def read_norms(source: str | os.PathLike) -> list[float]:
    """Return the gradient norms in a stability.json.

    Raises:
        ValueError: the file holds no norms.
    """
    with open(source, encoding="utf-8") as file:
        saved = json.load(file)
    if "norms" not in saved:
        raise ValueError(f"calibration={os.fspath(source)!r} holds no norms: give a stability.json of another run.")
    return saved["norms"]


def clipping_advice(clipped: Sequence[bool]) -> str | None:
    """Advise, as the playbook does, a lower learning rate if more than half of the updates are clipped."""
    if len(clipped) < _JUDGED_AFTER or sum(clipped) <= CLIPPED_TOO_OFTEN * len(clipped):
        return None
    return f"{sum(clipped)} of {len(clipped)} updates were clipped, more than half: lower the learning rate instead."
