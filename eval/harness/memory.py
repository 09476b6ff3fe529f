"""Bytes that a call needs at most."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class MemoryMode(TorchDispatchMode):
    """Count the bytes of live tensors that were made inside it, and their peak, as the allocator does on any device.

    Memory of tensors that were there before is not counted, whatever views are taken of it.
    """

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.made: set[int] = set()
        self.from_before: dict[int, torch.UntypedStorage] = {}  # kept, so that no new memory has the key of one

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for storage in _storages((args, kwargs)):
            if storage._cdata not in self.made:
                self.from_before[storage._cdata] = storage
        out = func(*args, **(kwargs or {}))
        for storage in _storages(out):
            if storage._cdata not in self.made and storage._cdata not in self.from_before:
                self.made.add(storage._cdata)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._release, storage._cdata, storage.nbytes())
        return out

    def _release(self, key: int, size: int) -> None:
        self.made.discard(key)
        self.live -= size


def _storages(tree) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_iter(tree) if isinstance(leaf, torch.Tensor)]


def peak_bytes(call: Callable[[], None]) -> int:
    """Return the most bytes of live tensors that a call makes."""
    with MemoryMode() as memory:
        call()
    return memory.peak
