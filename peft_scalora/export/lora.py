"""Turning a ScaLoRA adapter into a plain LoRA folder that PEFT, vLLM and TGI load without this package."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora.layer import LoraLayer
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from ..config import ScaLoRAConfig
from ..files.atomic import new_folder, replace_file
from ..files.card import exported_card, results_of
from ..files.checks import PREFIX, WEIGHTS_NAME
from ..files.vllm import max_lora_rank, obstacles
from ..layer import ScaLoRALayer
from ..maths.accumulator import singular_values, truncate
from ..rank import adapted_layers
from .saved import SavedLayer, read_adapter, saved_layers


@dataclass(frozen=True)
class ExportReport:
    """Report of an export: the folder written, its rank and its error.

    Attributes:
        path: the folder.
        rank: r of the plain LoRA adapter.
        max_lora_rank: what vLLM needs as --max-lora-rank; None if no setting is high enough.
        obstacles: why vLLM will refuse the adapter; empty if it will not.
        relative_error: ‖exported - trained‖_F / ‖trained‖_F of the weight change over all layers, truncation and
            rounding to `dtype` together; 0 for an exact export (up to float32 rounding).
        layer_errors: the relative error of each layer, by module name.
        size: bytes of the weights file.
    """

    path: str
    rank: int
    max_lora_rank: int | None
    obstacles: list[str]
    relative_error: float
    layer_errors: dict[str, float]
    size: int

    def __str__(self) -> str:
        """Return three lines: where it is, how exact, and who serves it."""
        if self.obstacles:
            served = f"vLLM will not serve it: {'; '.join(self.obstacles)}"
        else:
            served = f"vLLM serves it with --enable-lora --max-lora-rank {self.max_lora_rank}"
        return (
            f"wrote {self.path}: LoRA of rank {self.rank}, {self.size:,} bytes\n"
            f"relative error {self.relative_error:.3g} over {len(self.layer_errors)} layers\n{served}"
        )


class Form(NamedTuple):
    """Rank and dtype wanted for exported factors; rank None is the exact one."""

    rank: int | None
    dtype: torch.dtype

    def check(self) -> None:
        """Refuse a rank or a dtype that no factors can have; raises ValueError."""
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank={self.rank!r} must be 1 or more, or None for the exact export.")
        check_dtype(self.dtype)


def check_dtype(dtype: torch.dtype) -> None:
    """Refuse a dtype that no factors can have; raises ValueError."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype={dtype!r} must be torch.float32, torch.bfloat16 or torch.float16.")


def export_lora(
    model: PeftModel | PreTrainedModel,
    path: str | os.PathLike,
    adapter_name: str = "default",
    rank: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> ExportReport:
    """Write an adapter as plain LoRA: exact, or truncated to `rank` with its error in the report.

    The exact export has lora_A' = [lora_A; V], lora_B' = [s lora_B | U] and lora_alpha' = r' (scaling 1), where r' is r
    plus the number of accumulated columns.

    Args:
        model: a PeftModel, or a transformers or diffusers model that carries the adapter itself.
        path: the folder to write; it must not exist, or be empty.
        adapter_name: the adapter to export.
        rank: rank of the best approximation to write; None writes the exact change.
        dtype: of the factors written. bfloat16 and float16 halve the file, and the report's error includes the
            rounding.

    Returns:
        The folder, its rank, its size and the error against the trained change.

    Raises:
        ValueError: the model has no such ScaLoRA adapter, rank is not positive, or dtype is not a floating point one
            that holds the factors.
        FileExistsError: path exists and is not an empty folder.
    """
    layers = adapted_layers(model, adapter_name)
    if not any(isinstance(layer, ScaLoRALayer) for layer in layers.values()):
        raise ValueError(f"model has no ScaLoRA adapter adapter_name={adapter_name!r} to export.")
    config = model.peft_config[adapter_name]
    # A transformers model that carries the adapter itself has not the names of a saved one.
    prefix = "" if isinstance(model, PeftModel) else PREFIX
    state = get_peft_model_state_dict(model, adapter_name=adapter_name)
    # Copies: tied modules share tensors, which a safetensors file cannot.
    copied = {"device": "cpu", "copy": True, "memory_format": torch.contiguous_format}
    state = {prefix + key: value.detach().to(**copied) for key, value in state.items()}
    saved = saved_layers(state, config)
    saved = {name: _as_scaled(layer, layers[name.removeprefix(prefix)], adapter_name) for name, layer in saved.items()}
    return _export(saved, state, config, os.fspath(path), Form(rank, dtype), {})


def _as_scaled(saved: SavedLayer, layer: LoraLayer, adapter: str) -> SavedLayer:
    """Return the saved layer at the scale that the live layer has, which may differ from its configuration's."""
    if saved.U is None:
        return saved
    fold_scale = layer.accumulator(adapter).fold_scale
    return replace(saved, scaling=float(layer.scaling[adapter]), fold_scale=fold_scale)


def export_folder(folder: str, path: str, rank: int | None = None, dtype: torch.dtype = torch.float32) -> ExportReport:
    """Write a saved adapter as plain LoRA, as `export_lora` does, without its base model."""
    config, state = read_adapter(folder)
    saved = saved_layers(state, config)
    return _export(saved, state, config, path, Form(rank, dtype), results_of(folder))


def _export(
    layers: dict[str, SavedLayer],
    state: dict[str, Tensor],
    config: ScaLoRAConfig,
    path: str,
    form: Form,
    results: dict[str, float],
) -> ExportReport:
    form.check()
    rescaled = {name: layer for name, layer in layers.items() if layer.U is not None}
    factors, whole, lost = {}, {}, {}
    for name, layer in rescaled.items():
        P, Q = layer.change_factors()
        factors[name], whole[name], lost[name] = _approximated(P, Q, form)
    new_rank = max(Q.shape[0] for _, Q in factors.values())

    state = {key: value for key, value in state.items() if ".scalora_" not in key}
    for name, layer in rescaled.items():
        _put_factors(state, layer, *factors[name], new_rank)
        bias = layer.key_B.removesuffix("weight") + "bias"
        if bias in state:
            state[bias] = state[bias] * layer.scaling
    plain = {name: layer for name, layer in layers.items() if layer.U is None}
    error = (sum(lost.values()) / sum(whole.values())) ** 0.5 if sum(whole.values()) else 0.0
    layer_errors = {name: (lost[name] / whole[name]) ** 0.5 if whole[name] else 0.0 for name in rescaled}
    settings = plain_config(config, new_rank, plain)
    refused = obstacles(settings, state)
    with new_folder(path) as folder:
        save_file(state, os.path.join(folder, WEIGHTS_NAME), metadata={"format": "pt"})
        settings.save_pretrained(folder)
        card = exported_card(config, new_rank, error, refused, results)
        replace_file(os.path.join(folder, "README.md"), card)
    size = os.path.getsize(os.path.join(path, WEIGHTS_NAME))
    return ExportReport(path, new_rank, max_lora_rank(new_rank), refused, error, layer_errors, size)


def _approximated(P: Tensor, Q: Tensor, form: Form) -> tuple[tuple[Tensor, Tensor], float, float]:
    """Return (lora_B', lora_A') as matrices, the squared norm of the change, and that of what they miss of it."""
    whole = float(singular_values(P, Q).square().sum())
    new_P, new_Q, lost = P, Q, 0.0
    if form.rank is not None and form.rank < Q.shape[0]:
        (new_P,), (new_Q,), (norm,) = truncate(P[None], Q[None], form.rank)
        lost = float(norm) ** 2
    if form.dtype != torch.float32:
        new_P, new_Q = new_P.to(form.dtype), new_Q.to(form.dtype)
        if not (new_P.isfinite().all() and new_Q.isfinite().all()):
            raise ValueError(f"dtype={form.dtype!r} cannot hold the factors, which overflow: use torch.bfloat16.")
        missed = torch.cat([P, -new_P.float()], 1), torch.cat([Q, new_Q.float()], 0)
        lost = float(singular_values(*missed).square().sum())
    return (new_P, new_Q), whole, lost


def _put_factors(state: dict[str, Tensor], layer: SavedLayer, P: Tensor, Q: Tensor, rank: int) -> None:
    """Replace the layer's entries, padded with zero columns to `rank` and in the shapes of its factors."""
    padding = rank - Q.shape[0]
    P, Q = pad(P, (0, padding)), pad(Q, (0, 0, 0, padding))
    state[layer.key_B] = P.reshape(layer.lora_B.shape[0], rank, *layer.lora_B.shape[2:]).contiguous()
    state[layer.key_A] = Q.reshape(rank, *layer.lora_A.shape[1:]).contiguous()


def plain_config(config: ScaLoRAConfig, rank: int, plain: dict[str, SavedLayer]) -> LoraConfig:
    """Return the settings as a LoraConfig of scaling 1; layers that were plain LoRA keep their rank and scaling."""
    names = {field.name for field in fields(LoraConfig) if field.init} - {"peft_type", "runtime_config"}
    kept = {name: getattr(config, name) for name in names}
    kept.update(r=rank, lora_alpha=rank, use_rslora=False, rank_pattern={}, alpha_pattern={}, init_lora_weights=True)
    for name, layer in plain.items():
        # The whole name: PEFT would take a bare one for the end of others too.
        key = "^" + re.escape(name.removeprefix(PREFIX))
        r = layer.lora_A.shape[0]
        kept["rank_pattern"][key] = r
        kept["alpha_pattern"][key] = layer.scaling * r
    settings = LoraConfig(**kept | {"inference_mode": True})
    for name, value in vars(settings).items():
        if isinstance(value, set):  # in a fixed order, so that an export is always the same bytes
            setattr(settings, name, sorted(value))
    return settings
