"""Saved state of earlier versions, in the form of this one."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def upgraded(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict of earlier versions, or cast to another type, in the form of this version.

    Version 0.1 could keep the change itself (out x in) in U, with an empty V: a dense accumulator. As U V of rank
    min(out, in) it loses nothing. Counts that were cast to a floating-point type are whole numbers again.
    """
    state = {key: _recounted(key, tensor, state) for key, tensor in state.items()}
    for key_V, V in list(state.items()):
        if "scalora_V." in key_V and V.shape[0] == 0:
            key_U = key_V.replace("scalora_V.", "scalora_U.")
            key_progress = key_V.replace("scalora_V.", "scalora_progress.")
            progress = state[key_progress].clone()
            state[key_U], state[key_V] = _factored(state[key_U], is_empty=not progress[2])
            progress[2] *= min(state[key_U].shape[0], V.shape[1])  # a dense accumulator counted as one column
            state[key_progress] = progress
    return state


def _recounted(key: str, tensor: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    """Return counts as int64. bfloat16 rounds numbers above 256: no column that is in use is left out."""
    is_count = "scalora_progress." in key and tensor.is_floating_point()
    if not is_count or not torch.equal(tensor, tensor.round()):
        return tensor
    counts = tensor.long()
    V = state.get(key.replace("scalora_progress.", "scalora_V."))
    if V is not None and V.any():
        used = int(V.any(dim=1).nonzero().max()) + 1
        counts[2] = max(used, min(int(counts[2]), len(V)))
    return counts


def _factored(change: Tensor, is_empty: bool) -> tuple[Tensor, Tensor]:
    """Return U (out x R) and V (R x in) with U V = change and R = min(out, in); both zero for an empty accumulator."""
    out_features, in_features = change.shape
    if is_empty:
        rank = min(change.shape)
        return change.new_zeros(out_features, rank), change.new_zeros(rank, in_features)
    if in_features <= out_features:
        return change, torch.eye(in_features, dtype=change.dtype, device=change.device)
    return torch.eye(out_features, dtype=change.dtype, device=change.device), change
