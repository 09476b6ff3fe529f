"""The forward pass of a linear ScaLoRA layer as one function of its input."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ._seams import VARIANT_KWARG_KEYS
from .maths.low_rank import add_low_rank, add_low_rank_reference, linear_plus_low_rank
from .merged_base import without_change_of_others


def _is_plain(linear: nn.Module) -> bool:
    """Tell whether calling the module is no more than F.linear: engines that shard wrap, hook or retype it."""
    if type(linear) is not nn.Linear or type(linear.weight) not in (Tensor, nn.Parameter):
        return False
    hooks = (linear._forward_hooks, linear._forward_pre_hooks, linear._backward_hooks, linear._backward_pre_hooks)
    return not any(hooks) and "forward" not in linear.__dict__  # accelerate's offloading sets the latter


def _is_for_peft(argument: str) -> bool:
    """Tell whether PEFT's layers keep an argument of the forward pass to themselves."""
    return argument == "adapter_names" or argument in VARIANT_KWARG_KEYS


def _product_dtype(factor: Tensor) -> torch.dtype:
    device = factor.device.type
    has_autocast = torch.amp.is_autocast_available(device)  # "meta" has none
    autocast = has_autocast and torch.is_autocast_enabled(device) and factor.dtype != torch.float64
    return torch.get_autocast_dtype(device) if autocast else factor.dtype


class FusedLinear:
    """Forward pass of PEFT's lora.Linear with all products added in place, as maths/low_rank.py does it."""

    @without_change_of_others
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
        base = self.base_layer
        adapters = self._adapters_here()
        factors = [held[adapter] for adapter in adapters for held in (self.lora_A, self.lora_B)]
        if not all(_is_plain(factor) and factor.bias is None for factor in factors):
            return None
        is_called_with_more = args or not all(map(_is_for_peft, kwargs))
        if is_called_with_more or not adapters or not _is_plain(base) or torch.compiler.is_compiling():
            return "adapters"
        dtype = _product_dtype(factors[0].weight)
        # Not base.parameters(): in a replica of nn.DataParallel the weights are no parameters.
        weights = [base.weight] if base.bias is None else [base.weight, base.bias]
        is_frozen = all(weight.dtype == dtype and not weight.requires_grad for weight in weights)
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
        apart = self._is_dropping(adapter) or not self.has_accumulator(adapter)
        U, V = lora_B[:, :0], lora_A[:0]
        scale = 1.0
        if not apart:
            accumulator = self.accumulator(adapter)
            U, V = accumulator.beside_base()
            scale = accumulator.scale
        products = (lora_A.to(dtype), lora_B.to(dtype), U.detach(), V.detach(), self.scaling[adapter])
        if result is None:
            result = linear_plus_low_rank(x, self.base_layer.weight, self.base_layer.bias, *products, scale)
        else:
            add = add_low_rank_reference if torch.compiler.is_compiling() else add_low_rank
            result = add(result, self.lora_dropout[adapter](x), *products, scale)
        return self._add_accumulated(adapter, x, result) if apart else result
