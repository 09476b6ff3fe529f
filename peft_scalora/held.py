"""Saved state of an adapter that keeps its dtype whatever the model is cast to, or that the host works with."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Held(nn.Module):
    """A buffer named `weight` that moves with the model but keeps its dtype, as accumulated state has to."""

    def __init__(self, tensor: Tensor):
        super().__init__()
        self.register_buffer("weight", tensor)

    def _apply(self, fn, recurse=True):
        tensor = self._buffers["weight"]
        moved = fn(tensor)
        self._buffers["weight"] = moved if moved.dtype == tensor.dtype else tensor.to(moved.device)
        return self


class HostHeld(Held):
    """A few numbers that the host reads and writes without waiting for a device, saved as the buffer `weight`.

    The buffer moves with the model like any other, so that whatever walks, sends or compares buffers finds nothing
    unusual. Only whoever asks for it makes it say what the numbers are: a state dict, a copy, hotswapping. As they may
    write to it, the numbers are read from it again when they are next needed.
    """

    _numbers: list[float] | None = None  # None: what the buffer says

    def __init__(self, tensor: Tensor):
        super().__init__(tensor)
        self._buffers = _AskedFor(self)

    @property
    def numbers(self) -> list[float]:
        """The numbers, to read and to write."""
        if self._numbers is None:
            tensor = dict.__getitem__(self._buffers, "weight")
            self._numbers = [0] * len(tensor) if tensor.is_meta else tensor.tolist()
        return self._numbers

    def hand_over(self) -> None:
        """Make the buffer say what the numbers are."""
        tensor = dict.__getitem__(self._buffers, "weight")
        if self._numbers is not None and not tensor.is_meta:
            with torch.no_grad():
                tensor.copy_(torch.tensor(self._numbers, dtype=tensor.dtype))
            self._numbers = None

    def _apply(self, fn, recurse=True):
        dict.__setitem__(self._buffers, "weight", fn(dict.__getitem__(self._buffers, "weight")))
        return self

    def __getstate__(self) -> dict:
        self.hand_over()
        return self.__dict__ | {"_buffers": dict(self._buffers)}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._buffers = _AskedFor(self)


class _AskedFor(dict):
    """The buffers of a module that hands them over when they are asked for."""

    def __init__(self, module: HostHeld):
        super().__init__(module._buffers)
        self.module = module

    def __getitem__(self, name: str) -> Tensor:
        self.module.hand_over()
        return super().__getitem__(name)

    def items(self):
        self.module.hand_over()
        return super().items()

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        super().__setitem__(name, tensor)
        self.module._numbers = None


class HeldDict(nn.ModuleDict):
    """Adapter name -> tensor, saved as `<name>.weight` like the factors of `lora_A` (hotswap and TRL rely on that)."""

    held = Held

    def __getitem__(self, key: str) -> Tensor:
        return super().__getitem__(key).weight

    def __setitem__(self, key: str, tensor: Tensor) -> None:
        super().__setitem__(key, self.held(tensor))


class HostHeldDict(HeldDict):
    """Adapter name -> tensor of numbers that the host works with."""

    held = HostHeld


class _Number:
    """One entry of `Progress.numbers`."""

    def __init__(self, index: int):
        self.index = index

    def __get__(self, progress: Progress, owner: type) -> int:
        return progress.numbers[self.index]

    def __set__(self, progress: Progress, value: int) -> None:
        progress.numbers[self.index] = value


class Progress:
    """Counts of one adapter in one layer: a view of what is saved as `scalora_progress`."""

    steps = _Number(0)  # optimizer steps seen
    rescalings = _Number(1)
    columns = _Number(2)  # columns of U in use

    def __init__(self, held: HostHeld):
        self.held = held

    @property
    def numbers(self) -> list[int]:
        return self.held.numbers
