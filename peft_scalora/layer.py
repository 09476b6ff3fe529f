"""ScaLoRA layers: any of PEFT's LoRA layers plus the change that rescaling has folded out of its factors."""

from __future__ import annotations

import math
import weakref
from functools import cache

import torch
import torch.nn.functional as F
from peft.tuners import lora
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from ._seams import VARIANT_KWARG_KEYS
from .config import ScaLoRAConfig
from .held import HeldDict, HostHeldDict, Progress
from .maths.accumulator import singular_values
from .maths.low_rank import add_low_rank, add_low_rank_reference, linear_plus_low_rank
from .quantized import dequantized, keep_as_loaded

# Every live ScaLoRA layer, so that a hook on any optimizer can find the layers whose parameters it steps.
LAYERS: weakref.WeakSet[ScaLoRALayer] = weakref.WeakSet()


class ScaLoRALayer:
    """Mixin over a PEFT LoRA layer: W x + s B A x + U V x, with U (out x R) and V (R x in) in float32.

    A dense accumulator keeps the folded change itself in U (out x in) and has an empty V (0 x in).
    """

    def _add_accumulator(self, adapter: str, config: ScaLoRAConfig) -> None:
        """Create U, V and the saved progress of a new adapter, all zero."""
        for name, kind in (
            ("scalora_U", HeldDict),
            ("scalora_V", HeldDict),
            ("scalora_norms", HeldDict),
            ("scalora_progress", HostHeldDict),
        ):
            if name not in self._modules:
                setattr(self, name, kind())
        self.__dict__.setdefault("scalora_config", {})[adapter] = config
        lora_B, lora_A = self.factors(adapter)
        out_features, in_features = lora_B.shape[0], lora_A.flatten(1).shape[1]
        dense = config.accumulator == "dense"
        rank = config.accumulator_rank_for(self.r[adapter], out_features, in_features)
        device = self._accumulator_device()
        U = torch.zeros(out_features, in_features if dense else rank, dtype=torch.float32, device=device)
        self.scalora_U[adapter] = U
        self.scalora_V[adapter] = torch.zeros(0 if dense else rank, in_features, dtype=torch.float32, device=device)
        self.scalora_norms[adapter] = torch.stack([self._initial_column_norm2(adapter).to(device), U.new_zeros(())])
        self.scalora_progress[adapter] = torch.zeros(3, dtype=torch.int64, device="cpu")
        LAYERS.add(self)

    def _accumulator_device(self) -> torch.device:
        """The base weight's device: the factors may still be on the meta device while an adapter is loaded."""
        base = self.get_base_layer()
        for name in ("weight", "qweight", "W_q", "in_proj_weight"):
            if getattr(base, name, None) is not None:
                return getattr(base, name).device
        return next(base.parameters()).device

    def _initial_column_norm2(self, adapter: str) -> Tensor:
        """Mean squared column norm of the factor that does not start at zero; nan until a loaded adapter has one."""
        return self._column_norm2(*self.factors(adapter))

    @staticmethod
    def _column_norm2(lora_B: Tensor, lora_A: Tensor) -> Tensor:
        return _mean_squared_norm(lora_A, dim=1)

    def take_initial_norm(self, adapter: str, lora_B: Tensor, lora_A: Tensor) -> None:
        """Remember the norm of these whole factors as that of the initialised adapter."""
        self.scalora_norms[adapter][0] = self._column_norm2(lora_B, lora_A)

    def factors(self, adapter: str) -> tuple[nn.Parameter, nn.Parameter]:
        """The parameters (lora_B, lora_A): paper A (out x r) and paper B transposed (r x in), before flattening."""
        return self.lora_B[adapter].weight, self.lora_A[adapter].weight

    def progress(self, adapter: str) -> Progress:
        return Progress(self.scalora_progress[adapter])

    def is_dense(self, adapter: str) -> bool:
        return self.scalora_V[adapter].shape[0] == 0

    def initial_scaling(self, adapter: str) -> float:
        """s = lora_alpha / r (or / sqrt(r)) as configured: the scale at which change is folded into U V."""
        r = self.r[adapter]
        return self.lora_alpha[adapter] / (math.sqrt(r) if self.use_rslora[adapter] else r)

    def _relative_scale(self, adapter: str) -> float | Tensor:
        """How far set_scale, scale_layer and the like have moved the adapter from its configured scale."""
        initial = self.initial_scaling(adapter)
        return self.scaling[adapter] / initial if initial else 1.0

    def _columns_in_use(self, adapter: str) -> tuple[Tensor, Tensor]:
        """The columns of U and rows of V that hold folded change, perhaps none."""
        U, V = self.scalora_U[adapter], self.scalora_V[adapter]
        # A compiled graph wants one shape: all R columns, of which the unused are zero.
        if torch.compiler.is_compiling() or self.is_dense(adapter):
            return U, V
        columns = self.progress(adapter).columns
        return U[:, :columns], V[:columns]

    def accumulated_factors(self, adapter: str, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """The columns of U and rows of V in use, scaled and cast; None while nothing has been folded."""
        if not torch.compiler.is_compiling() and self.progress(adapter).columns == 0:
            return None
        U, V = self._columns_in_use(adapter)
        scale = self._relative_scale(adapter)
        if isinstance(scale, Tensor) or scale != 1.0:
            U = U * scale
        return U.to(dtype), V.to(dtype)

    def _accumulated_output(self, adapter: str, x: Tensor, U: Tensor, V: Tensor) -> Tensor:
        """U V x, or U x for a dense accumulator. Shapes: x (..., in) -> (..., out)."""
        x = x.to(U.dtype)
        return F.linear(x, U) if self.is_dense(adapter) else F.linear(F.linear(x, V), U)

    def _add_accumulated(self, adapter: str, x: Tensor, result: Tensor) -> Tensor:
        if adapter not in self.scalora_U:
            return result
        factors = self.accumulated_factors(adapter, self.factors(adapter)[1].dtype)
        return result if factors is None else result + self._accumulated_output(adapter, x, *factors).to(result.dtype)

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
        for adapter in sorted(set(names) & self.scalora_U.keys()):
            rows = [row for row, name in enumerate(names) if name == adapter]
            result[rows] = self._add_accumulated(adapter, x[rows], result[rows])
        return result

    def accumulated_product(self, adapter: str) -> tuple[Tensor, Tensor]:
        """Float32 factors (out x k) and (k x in) of the folded change, of a dense accumulator too; k may be 0."""
        factors = self.accumulated_factors(adapter, torch.float32)
        if factors is None:
            return self.scalora_U[adapter][:, :0], self.scalora_V[adapter][:0]
        U, V = factors
        return (U, torch.eye(U.shape[1], device=U.device)) if self.is_dense(adapter) else (U, V)

    def accumulator_capacity(self, adapter: str) -> int:
        """R; a dense accumulator holds any rank."""
        return self.scalora_V[adapter].shape[0] or min(self.scalora_U[adapter].shape)

    def accumulated_weight(self, adapter: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """The folded change (out x in): U V at the scale it is applied with."""
        factors = self.accumulated_factors(adapter, dtype)
        if factors is None:
            lora_B, lora_A = self.factors(adapter)
            return lora_B.new_zeros(lora_B.shape[0], lora_A.flatten(1).shape[1], dtype=dtype)
        U, V = factors
        return U if self.is_dense(adapter) else U @ V

    def get_delta_weight(self, adapter: str, *args, **kwargs) -> Tensor:
        """The whole weight change in the layout of the base weight: merging and PEFT's conversions use it."""
        delta = super().get_delta_weight(adapter, *args, **kwargs)
        if adapter not in self.scalora_U or self.progress(adapter).columns == 0:
            return delta
        # A half-precision sum of two rounded terms would round the change twice.
        accumulated = self.accumulated_weight(adapter, torch.promote_types(delta.dtype, torch.float32))
        accumulated = accumulated.T if self._delta_is_transposed() else accumulated
        return (delta + accumulated.reshape(delta.shape).to(delta.device)).to(delta.dtype)

    def _delta_is_transposed(self) -> bool:
        return bool(getattr(self, "fan_in_fan_out", False))

    def change_factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """P (out x k) and Q (k x in), float32, with P Q = s B A + U V and k = r + columns in use."""
        lora_B, lora_A = (p.detach().flatten(1).float() for p in self.factors(adapter))
        U, V = self.accumulated_product(adapter)
        return torch.cat([lora_B * self.scaling[adapter], U], 1), torch.cat([lora_A, V], 0)

    def change_singular_values(self, adapter: str) -> Tensor:
        """Singular values of the whole weight change, descending, float64."""
        if self.is_dense(adapter):
            P, Q = self.change_factors(adapter)
            return torch.linalg.svdvals(P.double() @ Q.double())
        return singular_values(*self.change_factors(adapter))

    def merge(self, *args, **kwargs) -> None:
        """As PEFT merges; what quantizing a base weight again does to the sum is kept for the model to report."""
        before, merged = dequantized(self.get_base_layer()), len(self.merged_adapters)
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
        for held in (self.scalora_U, self.scalora_V, self.scalora_norms, self.scalora_progress):
            held[target].copy_(held[source])
        for new, old in zip(self.factors(target), self.factors(source)):
            new.copy_(old)

    def delete_adapter(self, adapter_name: str) -> None:
        for held in (self.scalora_U, self.scalora_V, self.scalora_norms, self.scalora_progress, self.scalora_config):
            if adapter_name in held:
                del held[adapter_name]
        super().delete_adapter(adapter_name)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)
        if adapter_name in getattr(self, "scalora_U", {}):
            for held in (self.scalora_U, self.scalora_V, self.scalora_norms):
                held[adapter_name] = held[adapter_name].to(device or self._accumulator_device())
            norms = self.scalora_norms[adapter_name]
            # A plain LoRA adapter, loaded over factors that had no values yet.
            if not norms.is_meta and norms[0].isnan():
                norms[0] = self._initial_column_norm2(adapter_name)

    def __setstate__(self, state: dict) -> None:
        """Copies and unpickled layers have to be found by the optimizer hook too."""
        super().__setstate__(state)
        LAYERS.add(self)


def _is_plain(linear: nn.Module) -> bool:
    """Whether calling the module is no more than F.linear: engines that shard parameters wrap, hook or retype it."""
    if type(linear) is not nn.Linear or type(linear.weight) not in (Tensor, nn.Parameter):
        return False
    hooks = (linear._forward_hooks, linear._forward_pre_hooks, linear._backward_hooks, linear._backward_pre_hooks)
    return not any(hooks) and "forward" not in linear.__dict__  # accelerate's offloading sets the latter


def _is_for_peft(argument: str) -> bool:
    """Tell whether PEFT's layers keep an argument of the forward pass to themselves."""
    return argument == "adapter_names" or argument in VARIANT_KWARG_KEYS


def _product_dtype(factor: Tensor) -> torch.dtype:
    device = factor.device.type
    autocast = torch.is_autocast_enabled(device) and factor.dtype != torch.float64
    return torch.get_autocast_dtype(device) if autocast else factor.dtype


class _LinearMixin(ScaLoRALayer):
    """The forward pass of PEFT's lora.Linear with all products added in place (low_rank.py)."""

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        fusible = self._fusible(x, args, kwargs)
        if fusible is None:
            return super().forward(x, *args, **kwargs)
        adapters = self._adapters_here()
        if fusible == "all":
            first, *adapters = adapters
            result = self._add_products(first, x, None)
        else:
            kwargs = {name: value for name, value in kwargs.items() if not _is_for_peft(name)}
            result = self.base_layer(x, *args, **kwargs)
        dtype = result.dtype
        for adapter in adapters:
            result = self._add_products(adapter, x, result)
        return result.to(dtype)

    def _adapters_here(self) -> list[str]:
        return [adapter for adapter in self.active_adapters if adapter in self.lora_A]

    def _fusible(self, x: Tensor, args: tuple, kwargs: dict) -> str | None:
        """Say which products can be added in place: "all", those of the "adapters" to the base layer's output, or none.

        "all" takes a frozen matrix as base layer, which sees the same input as the first adapter.
        """
        if self.disable_adapters or self.merged or self.lora_variant or kwargs.get("adapter_names") is not None:
            return None
        adapters, base = self._adapters_here(), self.base_layer
        factors = [held[adapter] for adapter in adapters for held in (self.lora_A, self.lora_B)]
        if not all(_is_plain(factor) and factor.bias is None for factor in factors):
            return None
        is_called_with_more = args or not all(map(_is_for_peft, kwargs))
        if is_called_with_more or not adapters or not _is_plain(base) or torch.compiler.is_compiling():
            return "adapters"
        dtype = _product_dtype(factors[0].weight)
        is_frozen = all(p.dtype == dtype and not p.requires_grad for p in base.parameters())
        same_input = x.dtype.is_floating_point and not self._is_dropping(adapters[0])
        return "all" if is_frozen and same_input else "adapters"

    def _is_dropping(self, adapter: str) -> bool:
        dropout = self.lora_dropout[adapter]
        return dropout.training and not isinstance(dropout, nn.Identity)

    def _add_products(self, adapter: str, x: Tensor, result: Tensor | None) -> Tensor:
        """Return result + s B A x + U V x; without a result, that of the base layer."""
        lora_A, lora_B = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        dtype = _product_dtype(lora_A)
        x = self._cast_input_dtype(x, lora_A.dtype).to(dtype)
        apart = self._is_dropping(adapter) or adapter not in self.scalora_U or self.is_dense(adapter)
        U, V = (lora_B[:, :0], lora_A[:0]) if apart else self._columns_in_use(adapter)
        products = (lora_A.to(dtype), lora_B.to(dtype), U.detach(), V.detach(), self.scaling[adapter])
        scale = 1.0 if apart else self._relative_scale(adapter)
        if result is None:
            result = linear_plus_low_rank(x, self.base_layer.weight, self.base_layer.bias, *products, scale)
        else:
            add = add_low_rank_reference if torch.compiler.is_compiling() else add_low_rank
            result = add(result, self.lora_dropout[adapter](x), *products, scale)
        return self._add_accumulated(adapter, x, result) if apart else result


class _EmbeddingMixin(ScaLoRALayer):
    """lora_embedding_B (dim x r) starts random and lora_embedding_A (r x num) at zero: the reverse of Linear."""

    def factors(self, adapter: str) -> tuple[nn.Parameter, nn.Parameter]:
        return self.lora_embedding_B[adapter], self.lora_embedding_A[adapter]

    @staticmethod
    def _column_norm2(lora_B: Tensor, lora_A: Tensor) -> Tensor:
        return _mean_squared_norm(lora_B, dim=0)

    def _accumulated_output(self, adapter: str, x: Tensor, U: Tensor, V: Tensor) -> Tensor:
        # Not self._embed: with max_norm it would renormalise the accumulator in place.
        output = F.embedding(x, U.T) if self.is_dense(adapter) else F.embedding(x, V.T) @ U.T
        scale = self._get_embed_scale()
        return output if scale is None else output * scale.to(output.dtype)

    def _delta_is_transposed(self) -> bool:
        return True


class _ConvMixin(ScaLoRALayer):
    """lora_A (r, in, *kernel) and lora_B (out, r, 1...) are the factors of the flattened kernel (out x in*kernel)."""

    def _accumulated_output(self, adapter: str, x: Tensor, U: Tensor, V: Tensor) -> Tensor:
        conv = self.lora_A[adapter]
        x, kernel = x.to(U.dtype), conv.weight.shape[1:]
        if self.is_dense(adapter):
            return conv._conv_forward(x, U.view(-1, *kernel), None)
        hidden = conv._conv_forward(x, V.view(-1, *kernel), None)
        return self.lora_B[adapter]._conv_forward(hidden, U.view(*U.shape, *(1 for _ in kernel[1:])), None)


class _AttentionMixin(ScaLoRALayer):
    """nn.MultiheadAttention is adapted by merging before and unmerging after each call: get_delta_weight is enough."""

    def forward(self, query: Tensor, *args, **kwargs):
        return super(ScaLoRALayer, self).forward(query, *args, **kwargs)


def _mean_squared_norm(factor: Tensor, dim: int) -> Tensor:
    if factor.is_meta:
        return torch.tensor(math.nan)
    return factor.detach().flatten(1).double().square().sum(dim).mean().float()


@cache
def scalora_class(cls: type[LoraLayer]) -> type[ScaLoRALayer]:
    """The ScaLoRA version of one of PEFT's LoRA layer classes (Linear, Linear4bit, Conv2d, ...)."""
    convolutions = lora.layer.Conv1d, lora.layer.Conv2d, lora.layer.Conv3d
    mixin = ScaLoRALayer
    for base, special in ((lora.Embedding, _EmbeddingMixin), (convolutions, _ConvMixin)):
        mixin = special if issubclass(cls, base) else mixin
    if issubclass(cls, lora.layer.MultiheadAttention):
        mixin = _AttentionMixin
    if cls.forward is lora.Linear.forward:
        mixin = _LinearMixin
    # PEFT's messages use the class name, pickle the qualified one.
    names = {"__module__": __name__, "__qualname__": f"ScaLoRA{cls.__name__}"}
    return type(cls.__name__, (mixin, cls), names)


def make_scalora(layer: LoraLayer, adapter: str, config: ScaLoRAConfig) -> None:
    """Turn a LoRA layer that PEFT has just built, for whatever backend, into its ScaLoRA version in place."""
    layer.__class__ = scalora_class(type(layer))
    keep_as_loaded(layer.get_base_layer())
    layer._add_accumulator(adapter, config)


def __getattr__(name: str) -> type:
    """Classes by name, for unpickling in a process that has not built the layer yet."""
    base = name.removeprefix("ScaLoRA")
    cls = getattr(lora.layer, base, None) or getattr(lora, base, None) if base != name else None
    if not (isinstance(cls, type) and issubclass(cls, LoraLayer)):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return scalora_class(cls)
