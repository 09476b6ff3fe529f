"""Support for what PEFT and diffusers do for adapters of type LORA alone, or for LoRA layers as such.

Every comparison with that type is listed in tests/test_lora_only.py, with what becomes of it for ScaLoRA.
"""

from __future__ import annotations

import copy
import functools
import sys
import warnings
from collections.abc import Callable

import torch
from peft import LoraConfig, PeftType
from torch import Tensor, nn

from ._seams import take
from .layer import ScaLoRALayer
from .maths.accumulator import singular_values, truncate


def as_lora(config: LoraConfig) -> LoraConfig:
    """Return a copy of a configuration that PEFT takes for one of its type LORA."""
    plain = copy.deepcopy(config)
    plain.peft_type = PeftType.LORA
    return plain


def refuse_fused_experts(config: LoraConfig, model: nn.Module) -> None:
    """Refuse target modules that have become parts of fused parameters, as the experts of Mixtral have.

    For its type LORA, PEFT turns them into `target_parameters`; for any other it leaves them out without a word. An
    adapter that was saved without them is loaded, with a warning.

    Raises:
        ValueError: names what would be left out, and the target modules that can be adapted.
    """
    convert = take("peft.utils.transformers_weight_conversion:convert_peft_config_for_transformers")
    plain = as_lora(config)
    try:
        convert(plain, model, None)
        left_out = sorted(plain.target_parameters or ())
        rest = f"Name the layers to adapt without them: target_modules={sorted(plain.target_modules or ())}"
    except ValueError as error:  # some parts of a fused parameter, but not all
        left_out = [str(error)]
        rest = "Leave these out of target_modules"
    if not left_out:
        return
    message = (
        f"ScaLoRA does not support target_modules={config.target_modules!r} of {type(model).__name__}: transformers "
        f"keeps its experts in fused parameters ({', '.join(left_out)}), which have no layer to rescale and would be "
        f"left out. {rest}, or use peft.LoraConfig."
    )
    if config.base_fingerprint is None:
        raise ValueError(message)
    warnings.warn(message)  # it was saved, by a release that did leave them out


def warn_of_partial_factors(state: dict[str, Tensor], adapter: str) -> None:
    """Warn, as PEFT does for its type LORA, of factors that DeepSpeed ZeRO-3 or FSDP has not gathered before saving."""
    take("peft.utils.save_and_load:_validate_lora_adapter_state_dict")(state, adapter_name=adapter)


def install_exact_conversion() -> None:
    """Make `peft.convert_to_lora` and `peft.save_as_lora` exact for ScaLoRA layers; once per process."""
    module = sys.modules["peft.tuners.lora.conversion"]
    original = take("peft.tuners.lora.conversion:_convert_module_to_lora")

    @functools.wraps(original)
    def convert(layer: nn.Module, rank: int | float, adapter_name: str = "default") -> tuple[Tensor, Tensor, int]:
        if isinstance(layer, ScaLoRALayer) and layer.has_accumulator(adapter_name):
            return lora_factors(layer, adapter_name, rank)
        return original(layer, rank, adapter_name)

    module._convert_module_to_lora = convert


@torch.no_grad()
def lora_factors(layer: ScaLoRALayer, adapter: str, rank: int | float) -> tuple[Tensor, Tensor, int]:
    """Return lora_A (k x in) and lora_B (out x k), float32, of scaling 1, and k.

    Args:
        rank: an int is the largest k. A float is the share of the squared norm that has to be kept. Whatever does not
            ask for less gets the whole change, of k = r + columns in use, without any decomposition.

    Raises:
        ValueError: the layer has a trained bias, which these factors have no place for.
    """
    if layer.lora_bias[adapter]:
        raise ValueError(
            f"adapter {adapter!r} has lora_bias=True, and peft.convert_to_lora would leave the bias out: use "
            "peft_scalora.export_lora(model, folder)."
        )
    lora_B, lora_A = layer.change_factors(adapter)
    if isinstance(rank, float) and rank < 1:
        energy = singular_values(lora_B, lora_A).square().cumsum(0)
        rank = int((energy < rank * energy[-1]).sum()) + 1
    if isinstance(rank, int) and rank < lora_A.shape[0]:
        (lora_B,), (lora_A,), _ = truncate(lora_B[None], lora_A[None], rank)
    return lora_A.contiguous(), lora_B.contiguous(), lora_A.shape[0]


_DIFFUSERS = (
    "diffusers writes the adapter as if it were LoRA: its loaders take the factors and leave out the change that "
    "ScaLoRA has folded out of them, or stop at a field of the configuration. Write it with "
    "peft_scalora.export_lora(model, folder), and load it with model.load_lora_adapter(folder, "
    "prefix='base_model.model', weight_name='adapter_model.safetensors')."
)


def warn_in_diffusers() -> None:
    """Make diffusers' writers of LoRA files warn of ScaLoRA adapters, where diffusers is in use; once per process."""
    if "diffusers.loaders.peft" not in sys.modules:
        return
    pipelines = take("diffusers.loaders.lora_base:LoraBaseMixin")
    models = take("diffusers.loaders.peft:PeftAdapterMixin")
    if hasattr(models.save_lora_adapter, "warns_of_scalora"):
        return

    def is_in_state(state_dict: dict[str, Tensor], *args, **kwargs) -> bool:
        return any(".scalora_" in name for name in state_dict)

    def is_in_model(model: nn.Module, folder: str, adapter_name: str = "default", *args, **kwargs) -> bool:
        config = getattr(model, "peft_config", {}).get(adapter_name)
        return config is not None and config.peft_type == "SCALORA"

    pipelines.write_lora_layers = staticmethod(_warning(pipelines.write_lora_layers, is_in_state))
    models.save_lora_adapter = _warning(models.save_lora_adapter, is_in_model)


def _warning(function: Callable, is_scalora: Callable[..., bool]) -> Callable:
    @functools.wraps(function)
    def warning(*args, **kwargs):
        if is_scalora(*args, **kwargs):
            warnings.warn(_DIFFUSERS)
        return function(*args, **kwargs)

    warning.warns_of_scalora = True
    return warning
