"""Values of quantized base weights, and the error of rounding them again after a merge."""

from __future__ import annotations

from torch import Tensor, nn

from ._seams import dequantize_module_weight


def dequantized(layer: nn.Module) -> Tensor | None:
    """Return the values of a layer's quantized weight, in float32; None for a weight that is not quantized.

    Raises:
        ValueError: bitsandbytes has repacked the weight, and unpacking it gives other values.
    """
    weight = getattr(layer, "weight", None)
    if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
        raise ValueError(
            "The 4-bit base was evaluated on a CPU before it had the adapter: bitsandbytes has rounded its scales and "
            "packed it beyond recovery. Load the base model again, and add the adapter before evaluating."
        )
    # A parametrized weight is computed anew whenever it is asked for, and is no parameter.
    if not isinstance(weight, nn.Parameter) and not hasattr(layer, "W_q"):
        return None
    values = dequantize_module_weight(layer)
    return None if values is weight else values.detach().float()


def keep_as_loaded(layer: nn.Module) -> None:
    """Keep bitsandbytes from repacking a 4-bit weight in evaluation on a CPU, which rounds its scales for good."""
    if getattr(layer, "support_avx512bf16_for_cpu", False):
        layer.support_avx512bf16_for_cpu = False
