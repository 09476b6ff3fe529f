"""A saved ScaLoRA adapter as tensors: read without its base model, for `info` and `export`."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftConfig
from safetensors.torch import load_file
from torch import Tensor

from ..accumulator import ACCUMULATORS, as_configured
from ..config import ScaLoRAConfig
from ..files.checks import (
    FACTOR_KEYS,
    PROGRESS_KEY,
    SCALE_KEY,
    WEIGHTS_NAME,
    check_folder,
    check_values,
    pattern_value,
    refuse_other_weights,
)
from ..files.upgrade import upgraded


@dataclass(frozen=True)
class SavedLayer:
    """Saved tensors of one adapted layer: its factors, its scale s, and its change at the scale it was folded at.

    U and V are None for plain LoRA.
    """

    key_B: str
    key_A: str
    lora_B: Tensor
    lora_A: Tensor
    scaling: float
    U: Tensor | None
    V: Tensor | None
    fold_scale: float
    discarded: float

    def change_factors(self) -> tuple[Tensor, Tensor]:
        """Return P (out x k) and Q (k x in), float32, whose product is the weight change: s B A and U V at scale s."""
        P, Q = self.lora_B.flatten(1).float() * self.scaling, self.lora_A.flatten(1).float()
        if self.U is None:
            return P, Q
        U = self.U if self.fold_scale == self.scaling else self.U * (self.scaling / self.fold_scale)
        return torch.cat([P, U], 1), torch.cat([Q, self.V], 0)


def saved_layers(state: dict[str, Tensor], config: ScaLoRAConfig) -> dict[str, SavedLayer]:
    """Return the layers of an adapter's state dict, whose keys have no adapter names, by module name."""
    layers = {}
    for suffix_B, suffix_A in FACTOR_KEYS:
        for key in state:
            if not key.endswith(f".{suffix_A}"):
                continue
            name = key.removesuffix(f".{suffix_A}")
            U = V = None
            scaling = _scaling(config, name, state[key].shape[0])
            fold_scale = scaling or 1.0
            discarded = 0.0
            if f"{name}.{PROGRESS_KEY}" in state:
                accumulator = ACCUMULATORS[config.accumulator]
                tensors = {part: state[f"{name}.{part}.weight"] for part in accumulator.shapes((0, 0), 0)}
                U, V = accumulator.stored(tensors, columns=int(state[f"{name}.{PROGRESS_KEY}"][2]))
                if f"{name}.{SCALE_KEY}" in state:
                    fold_scale = as_configured(float(state[f"{name}.{SCALE_KEY}"]), scaling)
                discarded = float(state[f"{name}.scalora_norms.weight"][1])
            key_B = f"{name}.{suffix_B}"
            layers[name] = SavedLayer(key_B, key, state[key_B], state[key], scaling, U, V, fold_scale, discarded)
    return layers


def _scaling(config: LoraConfig, name: str, r: int) -> float:
    return pattern_value(config.alpha_pattern, name, config.lora_alpha) / (r**0.5 if config.use_rslora else r)


def read_adapter(folder: str) -> tuple[ScaLoRAConfig, dict[str, Tensor]]:
    """Return the configuration and the tensors of a saved ScaLoRA adapter.

    Raises:
        FileNotFoundError: a file is missing. ValueError: the files are not those of a ScaLoRA adapter.
    """
    for name in ("adapter_config.json", WEIGHTS_NAME):
        if not os.path.isfile(os.path.join(folder, name)):
            refuse_other_weights(folder)
            raise FileNotFoundError(f"adapter={folder!r} has no {name}: name the folder of a saved ScaLoRA adapter.")
    try:
        config = PeftConfig.from_pretrained(folder)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"adapter={folder!r} has an adapter_config.json that cannot be read ({error!r}): fetch or save it again."
        ) from error
    if not isinstance(config, ScaLoRAConfig):
        raise ValueError(f"adapter={folder!r} is of type {config.peft_type}, not SCALORA: there is nothing to convert.")
    check_folder(folder, config)
    path = os.path.join(folder, WEIGHTS_NAME)
    state = upgraded(load_file(path))
    check_values(state, path)
    return config, state
