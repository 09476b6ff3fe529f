"""Which parameters are linearized together, and which of them Muon steps."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

_BLOCK = re.compile(r"^(.*?\.)?\d+(?=\.)")  # up to the first number: model.layers.3


def layers_of(names: Iterable[str]) -> list[list[str]]:
    """Group parameter names by layer, for layerwise Gauss-Newton.

    The layers are what stands before the blocks (embedding), each block, and what stands after (final norm, head).

    Args:
        names: parameter names in the order of the model.
    """
    layers: dict[str, list[str]] = {}
    seen_block = False
    for name in names:
        block = _BLOCK.match(name)
        seen_block = seen_block or block is not None
        key = block.group() if block else ("head" if seen_block else "embedding")
        layers.setdefault(key, []).append(name)
    return list(layers.values())


def matrix_names(model: nn.Module) -> set[str]:
    """Return the names of the trainable matrices for Muon: all but those of embeddings and of the output layer."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    skipped = {
        id(p) for module in model.modules() if isinstance(module, nn.Embedding) or module is head
        for p in module.parameters()
    }  # fmt: skip
    return {n for n, p in model.named_parameters() if p.requires_grad and p.ndim == 2 and id(p) not in skipped}
