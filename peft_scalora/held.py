"""Saved state of an adapter that keeps its dtype, or its place on the host, whatever the model is cast or moved to."""

from __future__ import annotations

from torch import Tensor, nn


class Held(nn.Module):
    """A buffer named `weight` that moves with the model but keeps its dtype, as accumulated state has to."""

    def __init__(self, tensor: Tensor):
        super().__init__()
        self.register_buffer("weight", tensor)

    def _apply(self, fn, recurse=True):
        moved = fn(self.weight)
        self.weight = moved if moved.dtype == self.weight.dtype else self.weight.to(moved.device)
        return self


class HostHeld(Held):
    """A few numbers that stay on the CPU, where reading one does not wait for the accelerator."""

    def _apply(self, fn, recurse=True):
        return self


class HeldDict(nn.ModuleDict):
    """Adapter name -> tensor, saved as `<name>.weight` like the factors of `lora_A` (hotswap and TRL rely on that)."""

    held = Held

    def __getitem__(self, key: str) -> Tensor:
        return super().__getitem__(key).weight

    def __setitem__(self, key: str, tensor: Tensor) -> None:
        super().__setitem__(key, self.held(tensor))


class HostHeldDict(HeldDict):
    held = HostHeld

    def __getitem__(self, key: str) -> Tensor:
        held = nn.ModuleDict.__getitem__(self, key)
        if held.weight.device.type not in ("cpu", "meta"):  # loading with assign=True puts it where the file was read
            held.weight = held.weight.cpu()
        return held.weight


class _Number:
    """One entry of `Progress.numbers` as a Python int."""

    def __init__(self, index: int):
        self.index = index

    def __get__(self, progress: Progress, owner: type) -> int:
        return progress.numbers[self.index].item()

    def __set__(self, progress: Progress, value: int) -> None:
        progress.numbers[self.index] = value


class Progress:
    """What the host has to know of one adapter in one layer: a view of the saved tensor `scalora_progress`."""

    steps = _Number(0)  # optimizer steps seen
    rescalings = _Number(1)
    columns = _Number(2)  # columns of U in use

    def __init__(self, numbers: Tensor):
        self.numbers = numbers
