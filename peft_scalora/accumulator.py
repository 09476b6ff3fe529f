"""The accumulated change U V of one adapter in one layer, as every other room speaks to it.

Shape suffixes: L layers of one shape, M out_features, N in_features, K columns.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .layer import ScaLoRALayer


class Accumulator:
    """Change that was folded out of an adapter's factors in one layer, as U (out x R) and V (R x in) in float32.

    A view: it is made on demand and owns nothing. The layer holds and saves the tensors; `columns` of them are in use
    and the others are zero. To keep folded change in another way, derive a class and put it into `ACCUMULATORS` under
    the name that `ScaLoRAConfig(accumulator=...)` shall have.
    """

    def __init__(self, layer: ScaLoRALayer, adapter: str):
        self.layer = layer
        self.adapter = adapter

    # The tensors that are saved.

    @staticmethod
    def shapes(shape: tuple[int, int], capacity: int) -> dict[str, tuple[int, ...]]:
        """Return the names and shapes of the saved tensors for a weight of `shape` (out, in). Names need "lora_"."""
        return {"scalora_U": (shape[0], capacity), "scalora_V": (capacity, shape[1])}

    @staticmethod
    def stored(tensors: Mapping[str, Tensor], columns: int) -> tuple[Tensor, Tensor]:
        """Return U (out x K) and V (K x in) that saved tensors, with K columns in use, stand for."""
        return tensors["scalora_U"][:, :columns], tensors["scalora_V"][:columns]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Saved tensors by name, float32."""
        return {name: getattr(self.layer, name)[self.adapter] for name in self.shapes((0, 0), 0)}

    def allocate(self, shape: tuple[int, int], capacity: int, device: torch.device) -> None:
        """Create the tensors of an empty accumulator for a weight of `shape` (out, in)."""
        for name, size in self.shapes(shape, capacity).items():
            self.layer.hold(name, self.adapter, torch.zeros(size, dtype=torch.float32, device=device))

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (out, in) of the change; a convolution's kernel is flattened."""
        return self.layer.scalora_U[self.adapter].shape[0], self.layer.scalora_V[self.adapter].shape[1]

    @property
    def capacity(self) -> int:
        """Number of columns R that the accumulator can hold."""
        return self.layer.scalora_V[self.adapter].shape[0]

    # What they stand for.

    @property
    def columns(self) -> int:
        """Number of columns K in use."""
        return self.layer.progress(self.adapter).columns

    @columns.setter
    def columns(self, columns: int) -> None:
        self.layer.progress(self.adapter).columns = columns

    @property
    def is_lossless(self) -> bool:
        """Return True where R columns hold any change of this shape."""
        return self.capacity >= min(self.shape)

    @property
    def fold_scale(self) -> float:
        """Scale s at which change is folded into U V; it is saved with them."""
        held = self.layer.scalora_scale.get_submodule(self.adapter)
        if held.numbers[0] == 0:  # hotswapping found none in a file of version 0.1
            self.layer.scalora_scale[self.adapter].fill_(float(self.layer.scaling[self.adapter]) or 1.0)
        return as_configured(held.numbers[0], self.layer.initial_scaling(self.adapter))

    @property
    def scale(self) -> float | Tensor:
        """Number that U V is multiplied by when it is applied, so that it scales as the factors do.

        1 unless the adapter's scale has been moved since, by another lora_alpha, set_scale, scale_layer or the like.
        """
        now = self.layer.scaling[self.adapter]
        if torch.compiler.is_compiling():  # no guard on a number that hotswapping may change
            stored = self.layer.scalora_scale[self.adapter]
            return now / torch.where(stored == 0, now, stored)
        return now / self.fold_scale

    def in_use(self) -> tuple[Tensor, Tensor]:
        """Return the columns of U and rows of V in use, perhaps none, as they are stored: before `scale`."""
        return self.stored(self.tensors, self.columns)

    def factors(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Return U (out x K) and V (K x in), scaled as they are applied and cast; K may be 0."""
        return self._applied(*self.in_use(), dtype)

    def weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the accumulated change U V (out x in) as it is applied."""
        U, V = self.factors(dtype)
        return U @ V

    # The forward pass.

    def beside_base(self) -> tuple[Tensor, Tensor]:
        """Return the stored columns that the forward pass multiplies beside the base weight, before `scale`."""
        if torch.compiler.is_compiling():  # a compiled graph wants one shape: all R columns, of which the unused are 0
            return self.layer.scalora_U[self.adapter], self.layer.scalora_V[self.adapter]
        return self.in_use()

    def output(self, x: Tensor, dtype: torch.dtype) -> Tensor | None:
        """Return what the accumulated change adds to the layer's output, taken in `dtype`; None if that is nothing."""
        U, V = self.beside_base()
        if U.shape[1] == 0:
            return None
        return self.layer.low_rank_output(self.adapter, x, *self._applied(U, V, dtype))

    def _applied(self, U: Tensor, V: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        scale = self.scale
        if isinstance(scale, Tensor) or scale != 1.0:
            U = U * scale
        return U.to(dtype), V.to(dtype)

    # Folding. Accumulators of one shape, with equally many columns in use, are written as one batch.

    def fits(self, columns: int) -> bool:
        """Return True if so many more columns need no recompression."""
        return self.columns + columns <= self.capacity

    @classmethod
    def append(cls, accumulators: list[Accumulator], U_LMK: Tensor, V_LKN: Tensor) -> None:
        """Add U V, at the scale of what is stored, to each accumulator as K more columns that fit."""
        old = accumulators[0].columns
        new = old + V_LKN.shape[-2]
        _copy([each.layer.scalora_U[each.adapter][:, old:new] for each in accumulators], U_LMK)
        _copy([each.layer.scalora_V[each.adapter][old:new] for each in accumulators], V_LKN)
        for each in accumulators:
            each.columns = new

    @classmethod
    def replace(cls, accumulators: list[Accumulator], U_LMK: Tensor, V_LKN: Tensor) -> None:
        """Make U V, at the scale of what is stored, all that each accumulator holds: K columns, at most R."""
        columns = V_LKN.shape[-2]
        _copy([each.layer.scalora_U[each.adapter][:, :columns] for each in accumulators], U_LMK)
        _copy([each.layer.scalora_V[each.adapter][:columns] for each in accumulators], V_LKN)
        if columns < accumulators[0].capacity:
            unused = [each.layer.scalora_U[each.adapter][:, columns:] for each in accumulators]
            torch._foreach_zero_(unused + [each.layer.scalora_V[each.adapter][columns:] for each in accumulators])
        for each in accumulators:
            each.columns = columns


def as_configured(stored: float, configured: float) -> float:
    """Return the scale that was stored; as configured if that differs by no more than rounding to bfloat16."""
    return configured if abs(stored - configured) <= 2**-8 * abs(configured) else stored


def _copy(targets: list[Tensor], source_LMN: Tensor) -> None:
    torch._foreach_copy_(targets, list(source_LMN.unbind()))


_CANNOT_MERGE = (
    "accumulator='merged': some base weights cannot hold accumulated change, because they are quantized, sharded, "
    "offloaded, tied, trained, hooked or of another kind than linear and convolution layers. Their change acts beside "
    "them. Use accumulator='auto' if that is what you want."
)


class MergedAccumulator(Accumulator):
    """Accumulated change that lives in the base weight while its adapter trains, where the weight can hold it.

    U and V are saved as for `Accumulator`. Columns that the weight does not hold yet act beside it.
    """

    def beside_base(self) -> tuple[Tensor, Tensor]:
        """Return the stored columns that the base weight does not hold, before `scale`."""
        U, V = super().beside_base()
        merged = self.layer.merged_base
        return (U, V) if merged is None else (U[:, merged.columns :], V[merged.columns :])

    @classmethod
    def append(cls, accumulators: list[Accumulator], U_LMK: Tensor, V_LKN: Tensor) -> None:
        """Add U V as K more columns that fit, and merge where more than r columns act beside the base."""
        super().append(accumulators, U_LMK, V_LKN)
        for each in accumulators:
            each._settle(is_stale=False)

    @classmethod
    def replace(cls, accumulators: list[Accumulator], U_LMK: Tensor, V_LKN: Tensor) -> None:
        """Make U V all that each accumulator holds, and the base weights with it."""
        super().replace(accumulators, U_LMK, V_LKN)
        for each in accumulators:
            each._settle(is_stale=True)

    def _settle(self, is_stale: bool) -> None:
        """Bring the base weight up to date, or back where others look at it or it cannot hold change."""
        layer = self.layer
        can_merge = layer.can_merge()
        if not can_merge and layer.scalora_config[self.adapter].accumulator == "merged":
            warnings.warn(_CANNOT_MERGE)
        if layer.is_seen_by_others or not can_merge:
            layer.restore_base()
        else:
            held = 0 if layer.merged_base is None or is_stale else layer.merged_base.columns
            if self.columns - held > layer.r[self.adapter] or (is_stale and layer.merged_base is not None):
                layer.merge_into_base(self.adapter, *self.in_use())
        layer.is_seen_by_others = False


# How folded change is kept, by the name in the configuration.
ACCUMULATORS: dict[str, type[Accumulator]] = {
    "auto": MergedAccumulator,
    "merged": MergedAccumulator,
    "factored": Accumulator,
}
