"""The base weight of one layer while it holds accumulated change: W = cast(W0 + U V), with W0 kept on the host.

A merged weight is a form in memory: always computed anew from W0, so nothing drifts and W0 comes back bit for bit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .maths.accumulator import write_sum

# Modules whose forward pass is linear in a weight that no other form of the module stands for.
_MERGEABLE = (nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def can_hold_change(base: nn.Module) -> bool:
    """Tell whether a base layer's weight can hold accumulated change: whole, on one device, floating point, frozen.

    Quantized, sharded, offloaded, parametrized and hooked layers keep their change beside the weight.
    """
    weight = base._parameters.get("weight")
    if type(base) not in _MERGEABLE or type(weight) is not nn.Parameter:
        return False
    if weight.is_meta or weight.is_inference() or weight.requires_grad or hasattr(weight, "ds_id"):
        return False
    is_hooked = base._forward_hooks or base._forward_pre_hooks or "forward" in base.__dict__
    return weight.is_floating_point() and weight.is_contiguous() and not is_hooked


class MergedBase:
    """Base layer of one adapter whose weight holds the first `columns` columns of the accumulated change."""

    def __init__(self, base: nn.Module, adapter: str):
        self.base = base
        self.adapter = adapter
        self.columns = 0
        self.pristine = _host_copy(base.weight.detach())
        self._version = base.weight._version

    @torch.no_grad()
    def write(self, U_MK: Tensor, V_KN: Tensor) -> None:
        """Make the weight cast(W0 + U V).

        Raises:
            RuntimeError: somebody else has changed the weight since.
        """
        self._check_unchanged()
        write_sum(self._as_matrix(self.base.weight), self._as_matrix(self.pristine), U_MK, V_KN)
        self._version = self.base.weight._version
        self.columns = U_MK.shape[1]

    @torch.no_grad()
    def restore(self) -> None:
        """Put W0 back; raises RuntimeError where somebody else has changed the weight since."""
        self._check_unchanged()
        self.base.weight.copy_(self.pristine)

    def pristine_weight(self) -> nn.Parameter:
        """Return W0 on the device of the weight, as a parameter of its own."""
        return nn.Parameter(self.pristine.to(self.base.weight.device), requires_grad=False)

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Give the base layer W0 for a while. The merged weight is not written to: a graph may still need it."""
        merged = self.base.weight
        self.base._parameters["weight"] = self.pristine.to(merged.device)  # a compiled graph can make no parameter
        try:
            yield
        finally:
            self.base._parameters["weight"] = merged

    def _as_matrix(self, weight: Tensor) -> Tensor:
        """View a weight as (out, in), a kernel flattened."""
        weight = weight.detach()
        return weight.T if isinstance(self.base, Conv1D) else weight.flatten(1)

    def _check_unchanged(self) -> None:
        if self.base.weight._version != self._version:
            raise RuntimeError(
                "The base weight of a ScaLoRA layer was changed while it held accumulated change, which would be lost. "
                "Train with ScaLoRAConfig(accumulator='factored') to change base weights during a training."
            )


class MergeableLayer:
    """Mixin over a LoRA layer whose base weight may hold the accumulated change of the one adapter that is trained.

    Everything but the forward pass of that adapter sees W0: other forward passes by a parameter put in its place for
    the call, and whatever reads, saves, copies, moves or loads the layer after `restore_base`.
    """

    merged_base: MergedBase | None = None
    # Another view than the forward pass of one adapter was asked for since the last rescaling.
    is_seen_by_others = False
    # No other module uses the base weight; the model finds out.
    owns_base_weight = False

    def can_merge(self) -> bool:
        """Tell whether the base weight can hold accumulated change."""
        return self.owns_base_weight and can_hold_change(self.base_layer)

    def merge_into_base(self, adapter: str, U_MK: Tensor, V_KN: Tensor) -> None:
        """Let the base weight hold U V of the adapter, in the place of what it held."""
        if self.merged_base is None or self.merged_base.adapter != adapter:
            self.restore_base()
            self.merged_base = MergedBase(self.base_layer, adapter)
        self.merged_base.write(U_MK, V_KN)

    def restore_base(self) -> None:
        """Give the base layer its own weight back; all accumulated change acts beside it again."""
        merged = self.merged_base
        if merged is not None:
            merged.restore()
            self.merged_base = None

    def must_hide_change(self, adapter_names: list[str] | None) -> bool:
        """Tell whether a forward pass needs W0 where the weight holds change, and note that it was asked for."""
        merged = self.merged_base
        active = self.active_adapters
        is_own = len(active) == 1 and not (self.disable_adapters or self.merged or adapter_names is not None)
        if is_own and merged is not None and not torch.compiler.is_compiling():
            is_own = active[0] == merged.adapter and self.accumulator(merged.adapter).scale == 1.0
        if not is_own or torch.compiler.is_compiling():
            self.is_seen_by_others = True
            return merged is not None
        return False

    @contextmanager
    def pristine_base(self) -> Iterator[None]:
        """Show W0 and the whole accumulated change beside it for a while."""
        merged = self.merged_base
        self.merged_base = None
        try:
            with merged.hidden():
                yield
        finally:
            self.merged_base = merged

    # Views of the layer that PEFT and torch take.

    def get_base_layer(self) -> nn.Module:
        self.restore_base()
        return super().get_base_layer()

    @property
    def weight(self) -> Tensor:
        self.is_seen_by_others = True
        return super().weight if self.merged_base is None else self.merged_base.pristine_weight()

    def _apply(self, *args, **kwargs):
        self.restore_base()
        return super()._apply(*args, **kwargs)

    def _save_to_state_dict(self, *args, **kwargs) -> None:
        self.restore_base()
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self.restore_base()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict:
        self.restore_base()
        return self.__dict__.copy()


def without_change_of_others(forward: Callable) -> Callable:
    """Make a layer's forward pass see W0 unless it is that of the adapter whose change the weight holds."""

    @wraps(forward)
    def wrapped(self, x: Tensor, *args, **kwargs):
        if not self.must_hide_change(kwargs.get("adapter_names")):
            return forward(self, x, *args, **kwargs)
        with self.pristine_base():
            return forward(self, x, *args, **kwargs)

    return wrapped


def find_owned_weights(model: nn.Module) -> None:
    """Note at each layer whether its base weight is used by that layer alone: not tied, no module of two parents."""
    storages = Counter()
    parents = Counter()
    for module in model.modules():
        parents.update(map(id, module.children()))
        storages.update(_storage(p) for p in module._parameters.values() if p is not None)
    for layer in model.modules():
        if isinstance(layer, MergeableLayer):
            base = layer.base_layer
            weight = base._parameters.get("weight")
            is_single = weight is not None and _storage(weight) != 0 and storages[_storage(weight)] == 1
            layer.owns_base_weight = is_single and parents[id(base)] == 1


def _storage(param: Tensor) -> int:
    """Return what parameters of one memory have in common; those of other kinds or without memory count as shared."""
    if type(param) is not nn.Parameter or param.is_meta:
        return 0
    return param.untyped_storage().data_ptr()


def _host_copy(weight: Tensor) -> Tensor:
    copy = weight.to("cpu", copy=True)
    return copy.pin_memory() if weight.is_cuda else copy
