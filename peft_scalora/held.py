"""Saved state of an adapter that keeps its dtype whatever the model is cast to, or that the host works with."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .files.upgrade import upgraded

STEPS = 0  # index of the count of steps among the numbers of `Progress`


class Held(nn.Module):
    """Holder of a buffer `weight` that moves with the model but keeps its dtype, as accumulated state has to."""

    def __init__(self, tensor: Tensor):
        super().__init__()
        self.register_buffer("weight", tensor)

    def _apply(self, fn, recurse=True):
        tensor = dict.__getitem__(self._buffers, "weight")  # past what a subclass does when it is asked
        moved = fn(tensor)
        dict.__setitem__(self._buffers, "weight", moved if moved.dtype == tensor.dtype else tensor.to(moved.device))
        return self


class HostHeld(Held):
    """Holder of a few numbers that the host reads and writes without waiting for a device.

    They are saved as the buffer `weight`.

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
        """Numbers to read and to write."""
        if self._numbers is None:
            tensor = dict.__getitem__(self._buffers, "weight")
            self._numbers = [0] * len(tensor) if tensor.is_meta else tensor.tolist()
        return self._numbers

    def hand_over(self) -> None:
        """Make the buffer say what the numbers are; a compiled graph only reads one that is never behind them."""
        if torch.compiler.is_compiling():
            return
        tensor = dict.__getitem__(self._buffers, "weight")
        if self._numbers is not None and not tensor.is_meta:
            # A new one: functional transforms allow no writing to a tensor that they did not make.
            with torch.inference_mode(False):
                dict.__setitem__(self._buffers, "weight", tensor.new_tensor(self._numbers))
            self._numbers = None

    def __getstate__(self) -> dict:
        self.hand_over()
        return self.__dict__ | {"_buffers": dict(self._buffers)}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._buffers = _AskedFor(self)


class _AskedFor(dict):
    """Buffers of a module that are brought up to date when somebody asks for them."""

    def __init__(self, module: HostHeld):
        super().__init__(module._buffers)
        self.module = module

    def __getitem__(self, name: str) -> Tensor:
        self.module.hand_over()
        return super().__getitem__(name)

    def get(self, name: str, default: Tensor | None = None) -> Tensor | None:
        self.module.hand_over()
        return super().get(name, default)

    def values(self):
        self.module.hand_over()
        return super().values()

    def items(self):
        self.module.hand_over()
        return super().items()

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        super().__setitem__(name, tensor.to(super().__getitem__(name).dtype))
        self.module._numbers = None


class HeldDict(nn.ModuleDict):
    """Dictionary from adapter name to tensor.

    It is saved as `<name>.weight`, like the factors of `lora_A`: hotswap and TRL rely on that.
    """

    held = Held

    def __getitem__(self, key: str) -> Tensor:
        return super().__getitem__(key).weight

    def __setitem__(self, key: str, tensor: Tensor) -> None:
        super().__setitem__(key, self.held(tensor))


class HostHeldDict(HeldDict):
    """Dictionary from adapter name to a tensor of numbers that the host works with."""

    held = HostHeld


class _Number:
    """Descriptor of one entry of `Progress.numbers`."""

    def __init__(self, index: int):
        self.index = index

    def __get__(self, progress: Progress, owner: type) -> int:
        return progress.numbers[self.index]

    def __set__(self, progress: Progress, value: int) -> None:
        progress.numbers[self.index] = value


class Progress:
    """Counts of one adapter in one layer: a view of what is saved as `scalora_progress`."""

    steps = _Number(STEPS)  # optimizer steps seen
    rescalings = _Number(1)
    columns = _Number(2)  # columns of U in use

    def __init__(self, held: HostHeld):
        self.held = held

    @property
    def numbers(self) -> list[int]:
        return self.held.numbers


class HoldingLayer:
    """Mixin over a LoRA layer that keeps, saves and loads tensors of its adapters beside their factors."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Return what the LoRA layer has, of which a type checker sees nothing here."""

    def hold(self, name: str, adapter: str, tensor: Tensor, kind: type[HeldDict] = HeldDict) -> None:
        """Keep and save a tensor of the adapter as `name`."""
        if name not in self._modules:
            setattr(self, name, kind())
        getattr(self, name)[adapter] = tensor

    def held(self, adapter: str) -> dict[str, HeldDict]:
        """Return what holds the adapter's saved tensors, by name."""
        return {n: held for n, held in self._modules.items() if isinstance(held, HeldDict) and adapter in held}

    def own_scale(self, adapter: str) -> Tensor:
        """Return the scale to fold at; of an adapter whose own is 0, any other will do."""
        return torch.tensor([self.initial_scaling(adapter) or 1.0], dtype=torch.float32)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args) -> None:
        """Load a module as PyTorch does, after bringing what earlier versions saved into the form of this one."""
        own = {key: tensor for key, tensor in state_dict.items() if key.startswith(prefix)}
        state_dict.update(upgraded(own))
        self._warn_of_factors_alone(state_dict, prefix)
        for adapter in self.scalora_config:  # version 0.1 saved no scale: it was that of the configuration
            if f"{prefix}scalora_progress.{adapter}.weight" in state_dict:
                state_dict.setdefault(f"{prefix}scalora_scale.{adapter}.weight", self.own_scale(adapter))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _warn_of_factors_alone(self, state_dict: dict[str, Tensor], prefix: str) -> None:
        """Warn of factors to be loaded under an accumulated change that need not be the one that belongs to them."""
        names = [key.removeprefix(prefix).split(".") for key in state_dict]
        for adapter in self.scalora_config:
            parts = {name[0] for name in names if name[1:2] == [adapter]}
            has_factors = any(part.startswith("lora_") for part in parts)
            if has_factors and "scalora_progress" not in parts and self.accumulator(adapter).columns:
                warnings.warn(
                    f"The factors of adapter {adapter!r} are loaded without the change accumulated beside them, which "
                    "stays as it is now. The two belong together: keep and load the whole state dict, or "
                    "get_peft_model_state_dict(model)."
                )

    def __setstate__(self, state: dict) -> None:
        """Bring the state of a pickle of an earlier version into the form of this one."""
        super().__setstate__(state)
        for adapter in self.scalora_config:
            held = self.held(adapter)
            tensors = upgraded({f"{name}.weight": each[adapter] for name, each in held.items()})
            for name, each in held.items():
                each[adapter] = tensors[f"{name}.weight"]
            if "scalora_scale" not in held:
                device = self.scalora_norms[adapter].device
                self.hold("scalora_scale", adapter, self.own_scale(adapter).to(device), HostHeldDict)
