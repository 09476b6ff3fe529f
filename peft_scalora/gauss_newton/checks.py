"""Refusals of what Gauss-Newton cannot train, before it starts."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import nn

from .config import GaussNewtonConfig


def take_trainable(groups: list[dict]) -> dict[str, nn.Parameter]:
    """Return the trainable parameters by name, and remove the frozen ones from their groups.

    Raises:
        ValueError: parameters have no names, or none requires a gradient.
    """
    if any("param_names" not in group for group in groups):
        raise ValueError("GaussNewton needs named parameters: pass model.named_parameters(), or groups of such pairs.")
    trainable = {}
    for group in groups:
        named = {name: p for name, p in zip(group["param_names"], group["params"]) if p.requires_grad}
        group["param_names"] = list(named)
        group["params"] = list(named.values())
        trainable |= named
    if not trainable:
        raise ValueError("no parameter requires a gradient: unfreeze what GaussNewton is to train.")
    return trainable


def check_precision(params: Mapping[str, nn.Parameter]) -> None:
    """Refuse half precision, in which δ would be rounded away; raises ValueError."""
    for name, p in params.items():
        if p.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"parameter {name!r} is {p.dtype}: Gauss-Newton trains in float32. Load the model with "
                "dtype=torch.float32, or keep half precision for frozen weights only."
            )


def check_layers(layers: Sequence[Sequence[str]], params: Mapping[str, nn.Parameter]) -> None:
    """Refuse layers that do not hold every parameter once; raises ValueError."""
    if sorted(name for layer in layers for name in layer) != sorted(params):
        raise ValueError(f"layers={layers!r}: have to hold every parameter once. See layers_of.")


def check_decay(groups: list[dict], config: GaussNewtonConfig) -> None:
    """Refuse weight decay with conjugate gradients, which solve for the loss alone; raises ValueError."""
    decays = [group["weight_decay"] for group in groups if group["weight_decay"]]
    if decays and config.inner_optimizer == "cg":
        raise ValueError(
            f"weight_decay={decays[0]!r}: inner_optimizer='cg' solves for the loss alone; pass weight_decay=0."
        )


def muon_names(
    asked: Collection[str] | None, params: Mapping[str, nn.Parameter], config: GaussNewtonConfig
) -> set[str]:
    """Return the names of the matrices that Muon steps: those asked for, or all of them.

    Raises:
        ValueError: a name is not that of a matrix.
    """
    if config.inner_optimizer != "muon":
        return set()
    if asked is None:
        return {name for name, p in params.items() if p.ndim == 2}
    wrong = [name for name in asked if name not in params or params[name].ndim != 2]
    if wrong:
        raise ValueError(f"muon={wrong!r}: not matrices among the parameters. Muon steps matrices only.")
    return set(asked)
