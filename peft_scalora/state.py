"""Saving and loading of a layer's factors and accumulated change together."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .config import ScaLoRAConfig
from .layer import ScaLoRALayer

# A tensor rounded to bfloat16 is within this part of itself.
_ROUNDED = 2**-7


def layers_with(model: nn.Module, adapter: str) -> dict[str, ScaLoRALayer]:
    """Return the layers in which the adapter accumulates change, by the names they have in a state dict."""
    return {
        name.replace("_fsdp_wrapped_module.", ""): module
        for name, module in model.named_modules()
        if isinstance(module, ScaLoRALayer) and module.has_accumulator(adapter)
    }


def completed(model: nn.Module, adapter: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict of the model with what it lacks of the adapter's accumulated state.

    It may have been made of the trained parameters alone, and by engines that leave buffers out.

    Raises:
        ValueError: its factors are those of another time than the accumulated change; names the layer.
    """
    result = dict(state)
    for name, layer in layers_with(model, adapter).items():
        tensors = _tensors(name, layer, adapter)
        factors = [key for key in tensors if ".scalora_" not in key]
        missing = [key for key in tensors if ".scalora_" in key and key not in state]
        if not missing or not all(key in state for key in factors):
            continue
        if layer.accumulator(adapter).columns and not all(_are_equal(state[key], tensors[key]) for key in factors):
            raise ValueError(
                f"state_dict has the factors of {name} without the change accumulated beside them, and others than "
                "the model has now: the two belong together. Pass the whole model.state_dict() of that time, or leave "
                "state_dict out to save what the model holds."
            )
        result.update({key: tensors[key] for key in missing})
    return result


def whole_layers(model: nn.Module, adapter: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the entries to load: of every layer all or none.

    A layer with a tensor of another shape keeps what it has. Its entries of that shape are left in, for PyTorch to
    refuse or, with ignore_mismatched_sizes, for PEFT to drop.

    Raises:
        ValueError: a layer's factors come without the accumulated change that belongs to them; names the layer.
    """
    result = dict(state)
    refused = []
    for name, layer in layers_with(model, adapter).items():
        tensors = {key: tensor for key, tensor in _tensors(name, layer, adapter).items() if key in state}
        _refuse_factors_alone(name, layer, adapter, tensors, state)
        fitting = [key for key, tensor in tensors.items() if _shape(tensor) == state[key].shape]
        if len(fitting) < len(tensors):
            refused.append(name)
            for key in fitting:
                del result[key]
    if refused:
        warnings.warn(
            f"{len(refused)} layers have tensors of another shape than those to be loaded as {adapter!r}, "
            f"{refused[0]} for one: these layers keep what they have, factors and accumulated change. Build the model "
            "with the r and the accumulator_rank of the adapter."
        )
    return result


def _refuse_factors_alone(
    name: str, layer: ScaLoRALayer, adapter: str, tensors: Mapping[str, Tensor], state: Mapping[str, Tensor]
) -> None:
    if not tensors or any(".scalora_" in key for key in tensors):
        return
    # Nothing has been accumulated: plain LoRA is a start like another.
    if layer.accumulator(adapter).columns or any(".scalora_" in key for key in state):
        raise ValueError(
            f"What is to be loaded as {adapter!r} has the factors of {name} without the change accumulated beside them "
            "(scalora_U, scalora_V): the two belong together. Load the whole get_peft_model_state_dict(model)."
        )


def _tensors(name: str, layer: ScaLoRALayer, adapter: str) -> dict[str, Tensor]:
    """Return the adapter's tensors in one layer, by their keys in a state dict of the model."""
    own = {key: t for key, t in layer.state_dict().items() if not key.startswith("base_layer.")}
    return {f"{name}.{key}": tensor for key, tensor in own.items() if key.split(".")[1:2] == [adapter]}


def _shape(tensor: Tensor) -> torch.Size:
    return getattr(tensor, "ds_shape", tensor.shape)  # DeepSpeed empties the tensors that it partitions


def _are_equal(given: Tensor, own: Tensor) -> bool:
    """Tell whether two tensors are the same up to rounding; True where this process does not hold the whole."""
    if given.shape != own.shape or own.is_meta or hasattr(own, "full_tensor") or hasattr(given, "full_tensor"):
        return True
    return torch.allclose(given.detach().to(own.device, torch.float32), own.float(), rtol=_ROUNDED, atol=1e-7)


def _is_trained(layer: ScaLoRALayer, adapter: str, config: ScaLoRAConfig) -> bool:
    """Tell whether the factor that starts at zero is no longer; without one, whether the other's norm has changed."""
    if any(factor.is_meta for factor in layer.factors(adapter)):
        return False
    if config.init_lora_weights in (True, "gaussian"):
        return all(bool(factor.detach().any()) for factor in layer.factors(adapter))
    start, now = layer.scalora_norms[adapter][0], layer._initial_column_norm2(adapter)
    return not torch.isclose(start, now.to(start.device), rtol=1e-4)  # a cast to bfloat16 changes less


def warn_if_never_rescaled(model: nn.Module, adapter: str, config: ScaLoRAConfig) -> None:
    """Warn of layers that were trained though nobody counted their steps: they would be plain LoRA without a word."""
    layers = layers_with(model, adapter)
    uncounted = [name for name, layer in layers.items() if not any(layer.progress(adapter).numbers)]
    missed = [name for name in uncounted if _is_trained(layers[name], adapter, config)]
    if missed:
        warnings.warn(
            f"{len(missed)} of {len(layers)} layers of the ScaLoRA adapter {adapter!r} were trained but never "
            f"rescaled, so they are plain LoRA, {missed[0]} for one: no torch optimizer of both factors stepped them "
            "with its hooks. Give lora_A and lora_B of a layer to one optimizer derived from torch.optim.Optimizer, or "
            "call peft_scalora.rescale(model, optimizer) before each optimizer step."
        )
