"""Plain LoRA of one fixed rank, in memory: what a trainer sends to a generation server at every step.

A rescaling moves change from the factors into the accumulator, so factors alone are another model from one step to the
next. The rank of the whole change grows while it trains, but a server allots its memory once. Hence factors of rank
r + R at every moment, of which the columns that are not in use are zero.
"""

from __future__ import annotations

import functools
import os
import shutil
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from .._seams import TRL_ASYNC, take
from ..files.atomic import new_folder
from ..files.checks import FACTOR_KEYS, PREFIX, WEIGHTS_NAME
from ..layer import ScaLoRALayer
from ..rank import adapted_layers
from ..rescaling.sharding import whole_value
from .lora import check_dtype, plain_config

if TYPE_CHECKING:
    from accelerate import Accelerator


@torch.no_grad()
def lora_state_dict(
    model: PeftModel | PreTrainedModel, adapter_name: str = "default", dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Return the adapter as it is now, as the tensors of a plain LoRA adapter of rank r + R and scaling 1.

    Names, shapes and dtype are the same at every call. Nothing of the training is touched: change that the base weights
    hold stays there. Where factors are sharded, every process has to call it.

    Args:
        model: a PeftModel, or a transformers model that carries the adapter itself.
        adapter_name: the adapter to read.
        dtype: of the tensors; another one than float32 rounds them.

    Returns:
        lora_A (r + R, in) and lora_B (out, r + R) of every layer by their names in a saved adapter, on the devices of
        the factors. `lora_state_config` gives the configuration that belongs to them.

    Raises:
        ValueError: the model has no such ScaLoRA adapter, it trains more than factors, or dtype does not hold them.
    """
    check_dtype(dtype)
    layers = _layers(model, adapter_name)
    rank = _fixed_rank(layers, adapter_name)
    state = {}
    for name, layer in layers.items():
        key_B, key_A = FACTOR_KEYS[adapter_name in layer.lora_embedding_A]
        prefix = name if isinstance(model, PeftModel) else PREFIX + name
        lora_B, lora_A = _factors(layer, adapter_name, rank)
        state[f"{prefix}.{key_A}"], state[f"{prefix}.{key_B}"] = lora_A.to(dtype), lora_B.to(dtype)
    overflown = [key for key, tensor in state.items() if dtype == torch.float16 and tensor.isinf().any()]
    if overflown:
        raise ValueError(f"dtype={dtype!r} cannot hold {overflown[0]}, which overflows: use torch.bfloat16.")
    return state


def lora_state_config(model: PeftModel | PreTrainedModel, adapter_name: str = "default") -> LoraConfig:
    """Return the configuration of what `lora_state_dict` returns; the same throughout a training.

    Raises:
        ValueError: the model has no such ScaLoRA adapter, or it trains more than factors.
    """
    rank = _fixed_rank(_layers(model, adapter_name), adapter_name)
    return plain_config(model.peft_config[adapter_name], rank, {})


def save_lora_adapter(model: PeftModel, accelerator: Accelerator, adapter_name: str, dest_dir: str) -> None:
    """Write what `lora_state_dict` returns as an adapter folder, in the place of one that is there.

    It takes the arguments of TRL's function of that name. Every process has to call it; the main one writes.

    Args:
        model: whose adapter is read.
        accelerator: of the training.
        adapter_name: the adapter to write.
        dest_dir: the folder, which a server may look for at any time: it is whole as soon as it is there.
    """
    state = lora_state_dict(model, adapter_name)
    if not accelerator.is_main_process:
        return
    shutil.rmtree(dest_dir, ignore_errors=True)
    with new_folder(dest_dir) as folder:
        on_host = {key: tensor.cpu().contiguous() for key, tensor in state.items()}
        save_file(on_host, os.path.join(folder, WEIGHTS_NAME), metadata={"format": "pt"})
        lora_state_config(model, adapter_name).save_pretrained(folder)


def sync_trl_as_lora() -> None:
    """Let TRL's asynchronous trainers send ScaLoRA adapters alone, as plain LoRA; other adapters as before.

    Call it once, before training, and start the server with --enable-lora and a --max-lora-rank of at least r + R.
    """
    for name in TRL_ASYNC:
        save, validate = take(f"{name}:save_lora_adapter"), take(f"{name}:validate_lora_for_vllm_sync")
        if not hasattr(save, "knows_scalora"):
            trainer = sys.modules[name]
            trainer.save_lora_adapter = _saving_as_lora(save)
            trainer.validate_lora_for_vllm_sync = _validated_as_lora(validate)


def _saving_as_lora(original: Callable) -> Callable:
    @functools.wraps(original)
    def save(model: PeftModel, accelerator: Accelerator, adapter_name: str, dest_dir: str) -> None:
        is_scalora = model.peft_config[adapter_name].peft_type == "SCALORA"
        (save_lora_adapter if is_scalora else original)(model, accelerator, adapter_name, dest_dir)

    save.knows_scalora = True
    return save


def _validated_as_lora(original: Callable) -> Callable:
    @functools.wraps(original)
    def validate(model: PeftModel) -> LoraConfig:
        config = original(model)  # whose rank TRL compares with the server's
        return lora_state_config(model, model.active_adapters[0]) if config.peft_type == "SCALORA" else config

    return validate


def _layers(model: PeftModel | PreTrainedModel, adapter: str) -> dict[str, ScaLoRALayer]:
    """Return the adapter's layers by module name; refuse an adapter that is more than their factors."""
    layers = adapted_layers(model, adapter)
    if not any(isinstance(layer, ScaLoRALayer) for layer in layers.values()):
        raise ValueError(f"model has no ScaLoRA adapter adapter_name={adapter!r}.")
    config = model.peft_config[adapter]
    for field, nothing in {"modules_to_save": None, "trainable_token_indices": None, "bias": "none"}.items():
        if getattr(config, field) not in (nothing, [], {}):
            raise ValueError(
                f"{field}={getattr(config, field)!r} of adapter {adapter!r} trains weights that are no LoRA factors, "
                "so its factors alone are another model: send merged weights, or train without it."
            )
    for name, layer in layers.items():
        if not isinstance(layer, ScaLoRALayer) or layer.lora_bias[adapter]:
            raise ValueError(
                f"{name} of adapter {adapter!r} has groups or a trained bias, which factors of another rank cannot "
                "stand for: call export_lora(model, folder)."
            )
    return layers


def _fixed_rank(layers: dict[str, ScaLoRALayer], adapter: str) -> int:
    """Return the highest r + R of all layers."""
    return max(
        _whole_shape(layer.factors(adapter)[1])[0] + layer.accumulator(adapter).capacity for layer in layers.values()
    )


def _whole_shape(param: Tensor) -> tuple[int, ...]:
    return tuple(getattr(param, "ds_shape", param.shape))  # DeepSpeed ZeRO-3 leaves an empty one


def _factors(layer: ScaLoRALayer, adapter: str, rank: int) -> tuple[Tensor, Tensor]:
    """Return lora_B and lora_A of scaling 1 in the shapes of the layer's factors, padded with zeros to `rank`."""
    lora_B, lora_A = (whole_value(param) for param in layer.factors(adapter))
    U, V = layer.accumulator(adapter).factors()
    P = torch.cat([lora_B.flatten(1).float() * layer.scaling[adapter], U], 1)
    Q = torch.cat([lora_A.flatten(1).float(), V], 0)
    padding = rank - Q.shape[0]
    P, Q = pad(P, (0, padding)), pad(Q, (0, 0, 0, padding))
    return P.reshape(-1, rank, *lora_B.shape[2:]), Q.reshape(rank, *lora_A.shape[1:])
