"""Saved state of earlier versions, in the form of this one."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def upgraded(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict with every dense accumulator, which had an empty V, as the factored one of the same change.

    Version 0.1 could keep the change itself (out x in) in U. As U V of rank min(out, in) it loses nothing.
    """
    state = dict(state)
    for key_V, V in list(state.items()):
        if "scalora_V." in key_V and V.shape[0] == 0:
            key_U = key_V.replace("scalora_V.", "scalora_U.")
            key_progress = key_V.replace("scalora_V.", "scalora_progress.")
            progress = state[key_progress].clone()
            state[key_U], state[key_V] = _factored(state[key_U], is_empty=not progress[2])
            progress[2] *= min(state[key_U].shape[0], V.shape[1])  # a dense accumulator counted as one column
            state[key_progress] = progress
    return state


def _factored(change: Tensor, is_empty: bool) -> tuple[Tensor, Tensor]:
    """Return U (out x R) and V (R x in) with U V = change and R = min(out, in); both zero for an empty accumulator."""
    out_features, in_features = change.shape
    if is_empty:
        rank = min(change.shape)
        return change.new_zeros(out_features, rank), change.new_zeros(rank, in_features)
    if in_features <= out_features:
        return change, torch.eye(in_features, dtype=change.dtype, device=change.device)
    return torch.eye(out_features, dtype=change.dtype, device=change.device), change
