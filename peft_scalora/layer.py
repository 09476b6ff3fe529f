"""ScaLoRA layers: any of PEFT's LoRA layers plus the change that rescaling has folded out of its factors."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from peft.tuners import lora
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from .accumulator import ACCUMULATORS, Accumulator
from .config import ScaLoRAConfig
from .fused import FusedLinear
from .held import HoldingLayer, HostHeldDict, Progress
from .live import LiveSet, made_once
from .merged_base import MergeableLayer, without_change_of_others
from .quantized import dequantized, keep_as_loaded

# Every live ScaLoRA layer, so that a hook on any optimizer can find the layers whose parameters it steps.
LAYERS = LiveSet()


class ScaLoRALayer(MergeableLayer, HoldingLayer):
    """Mixin over a PEFT LoRA layer: W x + s B A x + U V x, with U (out x R) and V (R x in) in float32."""

    def _add_accumulator(self, adapter: str, config: ScaLoRAConfig) -> None:
        """Create the accumulator and the saved progress of a new adapter, all zero."""
        self.__dict__.setdefault("scalora_config", {})[adapter] = config
        lora_B, lora_A = self.factors(adapter)
        shape = lora_B.shape[0], lora_A.flatten(1).shape[1]
        device = self._accumulator_device()
        self.hold("scalora_progress", adapter, torch.zeros(3, dtype=torch.int64, device=device), HostHeldDict)
        self.hold("scalora_scale", adapter, self.own_scale(adapter).to(device), HostHeldDict)
        self.accumulator(adapter).allocate(shape, config.accumulator_rank_for(self.r[adapter], *shape), device)
        discarded = torch.zeros((), device=device)
        norms = torch.stack([self._initial_column_norm2(adapter).to(device), discarded])
        self.hold("scalora_norms", adapter, norms)
        LAYERS.add(self)

    def has_accumulator(self, adapter: str) -> bool:
        """Return True for a ScaLoRA adapter of this layer: transformers can put a plain LoRA adapter beside it."""
        return adapter in self.__dict__.get("scalora_config", ())

    def accumulator(self, adapter: str) -> Accumulator:
        """Return the view of the change folded out of the adapter so far."""
        return ACCUMULATORS[self.scalora_config[adapter].accumulator](self, adapter)

    def _accumulator_device(self) -> torch.device:
        """Return the base weight's device: while an adapter is loaded, the factors may still be on the meta device."""
        base = LoraLayer.get_base_layer(self)  # a look at its device alone
        for name in ("weight", "qweight", "W_q", "in_proj_weight"):
            if getattr(base, name, None) is not None:
                return getattr(base, name).device
        return next(base.parameters()).device

    def _initial_column_norm2(self, adapter: str) -> Tensor:
        """Return the mean squared column norm of the factor that does not start at zero; nan while it has no values."""
        return self._column_norm2(*self.factors(adapter))

    @staticmethod
    def _column_norm2(lora_B: Tensor, lora_A: Tensor) -> Tensor:
        return _mean_squared_norm(lora_A, dim=1)

    def take_initial_norm(self, adapter: str, lora_B: Tensor, lora_A: Tensor) -> None:
        """Remember the norm of these whole factors as that of the initialised adapter."""
        self.scalora_norms[adapter][0] = self._column_norm2(lora_B, lora_A)

    def factors(self, adapter: str) -> tuple[nn.Parameter, nn.Parameter]:
        """Return (lora_B, lora_A), the paper's A (out x r) and its B transposed (r x in), kernels not flattened."""
        return self.lora_B[adapter].weight, self.lora_A[adapter].weight

    def progress(self, adapter: str) -> Progress:
        return Progress(self.scalora_progress.get_submodule(adapter))

    def initial_scaling(self, adapter: str) -> float:
        """Return s = lora_alpha / r (or / sqrt(r)) as configured, whatever set_scale and the like have made of it."""
        r = self.r[adapter]
        return self.lora_alpha[adapter] / (math.sqrt(r) if self.use_rslora[adapter] else r)

    def low_rank_output(self, adapter: str, x: Tensor, U: Tensor, V: Tensor) -> Tensor:
        """Return U V x of one dtype. Shapes: x (..., in), U (out, K), V (K, in) -> (..., out)."""
        return F.linear(F.linear(x.to(U.dtype), V), U)

    def _add_accumulated(self, adapter: str, x: Tensor, result: Tensor) -> Tensor:
        if not self.has_accumulator(adapter):
            return result
        output = self.accumulator(adapter).output(x, self.factors(adapter)[1].dtype)
        return result if output is None else result + output.to(result.dtype)

    @without_change_of_others
    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        result = super().forward(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        names = kwargs.get("adapter_names")
        if names is None:
            dtype = result.dtype
            for adapter in self.active_adapters:
                result = self._add_accumulated(adapter, x, result)
            return result.to(dtype)
        for adapter in sorted(set(names) & self.scalora_config.keys()):
            rows = [row for row, name in enumerate(names) if name == adapter]
            result[rows] = self._add_accumulated(adapter, x[rows], result[rows])
        return result

    def get_delta_weight(self, adapter: str, *args, **kwargs) -> Tensor:
        """Return the whole weight change in the layout of the base weight, for merging and PEFT's conversions."""
        delta = super().get_delta_weight(adapter, *args, **kwargs)
        if not self.has_accumulator(adapter) or self.accumulator(adapter).columns == 0:
            return delta
        # A half-precision sum of two rounded terms would round the change twice.
        accumulated = self.accumulator(adapter).weight(torch.promote_types(delta.dtype, torch.float32))
        accumulated = accumulated.T if self._delta_is_transposed() else accumulated
        return (delta + accumulated.reshape(delta.shape).to(delta.device)).to(delta.dtype)

    def _delta_is_transposed(self) -> bool:
        return bool(getattr(self, "fan_in_fan_out", False))

    def change_factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """Return P (out x k) and Q (k x in), float32, with P Q = s B A + U V and k = r + columns in use."""
        lora_B, lora_A = (p.detach().flatten(1).float() for p in self.factors(adapter))
        U, V = self.accumulator(adapter).factors()
        return torch.cat([lora_B * self.scaling[adapter], U], 1), torch.cat([lora_A, V], 0)

    def merge(self, *args, **kwargs) -> None:
        """Merge as PEFT does, and keep the error of quantizing the sum again for the model to report."""
        before = dequantized(self.get_base_layer())
        merged = len(self.merged_adapters)
        super().merge(*args, **kwargs)
        if before is not None and self.merged_adapters[merged:]:
            change = sum(self.get_delta_weight(adapter) for adapter in self.merged_adapters[merged:])
            error = dequantized(self.get_base_layer()) - (before + change)
            self.requantization = float(error.detach().norm()), float(change.detach().norm())

    # What PEFT does with an adapter, extended to the accumulated state.

    def update_layer(self, adapter_name: str, *args, config: ScaLoRAConfig, **kwargs) -> None:
        super().update_layer(adapter_name, *args, config=config, **kwargs)
        if isinstance(config, ScaLoRAConfig):  # transformers can put a plain LoRA adapter beside a ScaLoRA one
            self._add_accumulator(adapter_name, config)

    @torch.no_grad()
    def copy_adapter(self, source: str, target: str) -> None:
        """Give `target`, of the same shapes, the factors and the accumulated change of `source`."""
        self.restore_base()
        for held in self.held(source).values():
            held[target].copy_(held[source])
        for new, old in zip(self.factors(target), self.factors(source)):
            new.copy_(old)

    def delete_adapter(self, adapter_name: str) -> None:
        self.restore_base()
        for held in self.held(adapter_name).values():
            del held[adapter_name]
        self.scalora_config.pop(adapter_name, None)
        super().delete_adapter(adapter_name)
        LAYERS.add(self)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)
        if self.has_accumulator(adapter_name):
            for held in self.held(adapter_name).values():
                held[adapter_name] = held[adapter_name].to(device or self._accumulator_device())
            norms = self.scalora_norms[adapter_name]
            # A plain LoRA adapter, loaded over factors that had no values yet.
            if not norms.is_meta and norms[0].isnan():
                norms[0] = self._initial_column_norm2(adapter_name)

    def __setstate__(self, state: dict) -> None:
        """Restore a copied or unpickled layer, and let the optimizer hook find it."""
        super().__setstate__(state)
        LAYERS.add(self)


class _EmbeddingMixin(ScaLoRALayer):
    """Mixin over PEFT's embedding layer.

    lora_embedding_B (dim x r) starts random and lora_embedding_A (r x num) at zero: the reverse of Linear.
    """

    def factors(self, adapter: str) -> tuple[nn.Parameter, nn.Parameter]:
        return self.lora_embedding_B[adapter], self.lora_embedding_A[adapter]

    @staticmethod
    def _column_norm2(lora_B: Tensor, lora_A: Tensor) -> Tensor:
        return _mean_squared_norm(lora_B, dim=0)

    def low_rank_output(self, adapter: str, x: Tensor, U: Tensor, V: Tensor) -> Tensor:
        # Not self._embed: with max_norm it would renormalise the accumulator in place.
        output = F.embedding(x, V.T) @ U.T
        scale = self._get_embed_scale()
        return output if scale is None else output * scale.to(output.dtype)

    def _delta_is_transposed(self) -> bool:
        return True


class _ConvMixin(ScaLoRALayer):
    """Mixin over PEFT's convolutions.

    lora_A (r, in, *kernel) and lora_B (out, r, 1...) are the factors of the flattened kernel (out x in*kernel).
    """

    def low_rank_output(self, adapter: str, x: Tensor, U: Tensor, V: Tensor) -> Tensor:
        conv = self.lora_A[adapter]
        kernel = conv.weight.shape[1:]
        hidden = conv._conv_forward(x.to(U.dtype), V.view(-1, *kernel), None)
        return self.lora_B[adapter]._conv_forward(hidden, U.view(*U.shape, *(1 for _ in kernel[1:])), None)


class _AttentionMixin(ScaLoRALayer):
    """Mixin over PEFT's nn.MultiheadAttention, which merges before and unmerges after each call.

    So `get_delta_weight` is enough, and forward stays PEFT's.
    """

    @torch.compiler.disable  # no graph can hold what PEFT does to the weights' data; plain LoRA fails there
    def forward(self, query: Tensor, *args, **kwargs):
        return super(ScaLoRALayer, self).forward(query, *args, **kwargs)


def _mean_squared_norm(factor: Tensor, dim: int) -> Tensor:
    if factor.is_meta:
        return torch.tensor(math.nan)
    return factor.detach().flatten(1).double().square().sum(dim).mean().float()


@made_once
def scalora_class(cls: type[LoraLayer]) -> type[ScaLoRALayer]:
    """Return the ScaLoRA version of one of PEFT's LoRA layer classes (Linear, Linear4bit, Conv2d, ...)."""
    convolutions = lora.layer.Conv1d, lora.layer.Conv2d, lora.layer.Conv3d
    mixin = ScaLoRALayer
    for base, special in ((lora.Embedding, _EmbeddingMixin), (convolutions, _ConvMixin)):
        mixin = special if issubclass(cls, base) else mixin
    if issubclass(cls, lora.layer.MultiheadAttention):
        mixin = _AttentionMixin
    if cls.forward is lora.Linear.forward:
        return _named(cls, (FusedLinear, ScaLoRALayer, cls))
    return _named(cls, (mixin, cls))


def _named(cls: type[LoraLayer], bases: tuple[type, ...]) -> type[ScaLoRALayer]:
    # PEFT's messages use the class name, pickle the qualified one.
    return type(cls.__name__, bases, {"__module__": __name__, "__qualname__": f"ScaLoRA{cls.__name__}"})


def make_scalora(layer: LoraLayer, adapter: str, config: ScaLoRAConfig) -> None:
    """Turn a LoRA layer that PEFT has just built, for whatever backend, into its ScaLoRA version in place."""
    layer.__class__ = scalora_class(type(layer))
    keep_as_loaded(layer.get_base_layer())
    layer._add_accumulator(adapter, config)


def __getattr__(name: str) -> type:
    """Return a layer class by its name, for unpickling in a process that has not built such a layer yet."""
    base = name.removeprefix("ScaLoRA")
    cls = getattr(lora.layer, base, None) or getattr(lora, base, None) if base != name else None
    if not (isinstance(cls, type) and issubclass(cls, LoraLayer)):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return scalora_class(cls)
