"""Effective rank of a trained weight change."""

from __future__ import annotations

from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from .layer import ScaLoRALayer
from .maths.accumulator import effective_rank as count_above
from .maths.accumulator import singular_values


def adapted_layers(model: nn.Module, adapter_name: str) -> dict[str, LoraLayer]:
    """Return the LoRA and ScaLoRA layers that have the adapter, by module name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and (adapter_name in module.lora_A or adapter_name in module.lora_embedding_A)
    }


def change_factors(layer: LoraLayer, adapter: str) -> tuple[Tensor, Tensor]:
    """Return P (out x k) and Q (k x in), float32, whose product is the layer's whole weight change."""
    if isinstance(layer, ScaLoRALayer):
        return layer.change_factors(adapter)
    if adapter in layer.lora_embedding_A:
        lora_B, lora_A = layer.lora_embedding_B[adapter], layer.lora_embedding_A[adapter]
    else:
        lora_B, lora_A = layer.lora_B[adapter].weight, layer.lora_A[adapter].weight
    return lora_B.detach().flatten(1).float() * layer.scaling[adapter], lora_A.detach().flatten(1).float()


def effective_rank(model: nn.Module, tol: float = 0.01, adapter_name: str = "default") -> dict[str, int]:
    """Return the rank of each layer's whole weight change: its singular values above `tol` times the largest.

    LoRA adapters have one too, for comparison. A layer that has not been trained has rank 0.

    Args:
        model: a model with LoRA or ScaLoRA layers.
        tol: fraction of a layer's largest singular value.
        adapter_name: the adapter to look at.

    Returns:
        The rank by module name.

    Raises:
        ValueError: tol is not in [0, 1), or the model has no such adapter.
    """
    if not 0 <= tol < 1:
        raise ValueError(f"tol={tol!r} must be at least 0 and below 1: it is a fraction of the largest singular value.")
    layers = adapted_layers(model, adapter_name)
    if not layers:
        raise ValueError(f"model has no LoRA or ScaLoRA layer with adapter_name={adapter_name!r}.")
    sigmas = {name: singular_values(*change_factors(layer, adapter_name)) for name, layer in layers.items()}
    return {name: int(count_above(sigma, tol)) for name, sigma in sigmas.items()}
