"""Checks of an adapter's files, which may come from anybody, before anything is built from them.

Adapters are read from safetensors alone, whose header gives every name, dtype and shape without reading a value.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open
from torch import Tensor

from .._seams import get_pattern_key

if TYPE_CHECKING:
    from peft import LoraConfig

WEIGHTS_NAME = "adapter_model.safetensors"
# What a folder may hold in its place, and why it is not read.
_OTHER_WEIGHTS = {
    "adapter_model.bin": "a pickle file can run code when it is read. If you trust it, convert it once: "
    "safetensors.torch.save_file(torch.load('adapter_model.bin', weights_only=True), 'adapter_model.safetensors')",
    f"{WEIGHTS_NAME}.index.json": "an index names files to read, and an adapter is one file. Save it again",
}
# Where a layer's factors are, linear and convolution layers first, then embeddings.
FACTOR_KEYS = (("lora_B.weight", "lora_A.weight"), ("lora_embedding_B", "lora_embedding_A"))
PREFIX = "base_model.model."  # of a saved layer, before its name in the base model
PROGRESS_KEY = "scalora_progress.weight"
SCALE_KEY = "scalora_scale.weight"  # which version 0.1 did not save
_STATE_SHAPES = {"scalora_norms.weight": (2,), PROGRESS_KEY: (3,)}
_REMEDY = "The adapter is damaged or not what it says: fetch or save it again."


def accumulator_rank(asked: int | str | None, r: int, *features: int) -> int:
    """Return R, the capacity in columns of the accumulator of a layer with adapter rank r and so many features."""
    columns = 7 * r if asked == "auto" else 8 * r if asked is None else int(asked)
    return min(columns, *features) if features else columns


def check_folder(folder: str, config: LoraConfig) -> None:
    """Check the weights file beside a configuration by its header; a folder without one has only the configuration.

    Raises:
        ValueError: it is no safetensors file, or does not fit the configuration; names file, tensor, value and remedy.
    """
    path = os.path.join(folder, WEIGHTS_NAME)
    if not os.path.lexists(path):
        refuse_other_weights(folder)
        return
    if not os.path.isfile(path):
        raise ValueError(f"{path} is no complete safetensors file (no regular file at all). {_REMEDY}")
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is no complete safetensors file ({error}). {_REMEDY}") from error
    check_shapes(shapes, config, path)


def refuse_other_weights(folder: str) -> None:
    """Refuse weights in a file that is not read, for a folder without the one that is; raises ValueError."""
    for name, reason in _OTHER_WEIGHTS.items():
        if os.path.lexists(os.path.join(folder, name)):
            raise ValueError(f"ScaLoRA does not support {name} (adapter={folder!r}): {reason}.")


def check_shapes(shapes: Mapping[str, tuple[int, ...]], config: LoraConfig, source: str) -> None:
    """Check that every layer's tensors have the shapes that the configuration gives them.

    Raises:
        ValueError: names source, tensor, shape and what was expected.
    """
    factors = [(key.removesuffix(A), A, B) for key in shapes for B, A in FACTOR_KEYS if key.endswith(f".{A}")]
    if not factors:
        raise ValueError(f"{source} holds no layer of a ScaLoRA adapter. {_REMEDY}")
    # PEFT will build layers of these ranks before it reads the file: no larger than what the file is about.
    largest = max((size for shape in shapes.values() for size in shape), default=0)
    for field, rank in {"r": config.r, **{f"rank_pattern[{k!r}]": r for k, r in config.rank_pattern.items()}}.items():
        if rank > largest:
            raise ValueError(f"{field}={rank} is above every dimension of the tensors in {source}. {_REMEDY}")
    _refuse_factors_alone(shapes, factors, source)
    for name, suffix_A, suffix_B in factors:
        _check_layer(shapes, name, suffix_A, suffix_B, config, source)


def _refuse_factors_alone(shapes: Mapping, factors: list[tuple[str, str, str]], source: str) -> None:
    """Refuse a file without any accumulated change: saved from the trained parameters alone, it has lost it."""
    if any("scalora_" in key for key in shapes):
        return
    for name, A, B in factors:
        # Those of a grouped convolution, which is trained as plain LoRA, cannot be multiplied.
        if shapes.get(name + B, ())[1:2] == shapes[name + A][:1]:
            raise ValueError(
                f"{source} has the factors of {name.removesuffix('.')} without the change accumulated beside them "
                "(scalora_U, scalora_V): it was saved from the trained parameters alone. Save the adapter again with "
                "model.save_pretrained(folder)."
            )


def _check_layer(shapes: Mapping, name: str, suffix_A: str, suffix_B: str, config: LoraConfig, source: str) -> None:
    if not any(key.startswith(f"{name}scalora_") for key in shapes):
        return  # plain LoRA, in a shape that PEFT knows
    A = shapes[name + suffix_A]
    B = shapes.get(name + suffix_B, ())
    r = pattern_value(config.rank_pattern, name.removesuffix("."), config.r)
    out_features = B[0] if B else 0
    in_features = prod(A[1:])
    expected = {suffix_A: (r, *A[1:]), suffix_B: (out_features, r, *B[2:])} | _STATE_SHAPES
    for key, shape in config.accumulator_shapes(r, out_features, in_features).items():
        expected[f"{key}.weight"] = shape
    if shapes.get(f"{name}scalora_V.weight") == (0, in_features):
        expected.update(_dense_shapes(config, r, out_features, in_features))
    if name + SCALE_KEY in shapes:
        expected[SCALE_KEY] = (1,)
    for key, shape in expected.items():
        if shapes.get(name + key) != shape:
            raise ValueError(
                f"{source} has {name}{key} of shape {shapes.get(name + key, 'missing')} where r={r}, accumulator="
                f"{config.accumulator!r} and accumulator_rank={config.accumulator_rank} want {shape}. {_REMEDY}"
            )


def _dense_shapes(config: LoraConfig, r: int, out_features: int, in_features: int) -> dict[str, tuple[int, int]]:
    """Return the shapes of a dense accumulator (version 0.1), if one that loses nothing is to hold it."""
    if config.accumulator_rank_for(r, out_features, in_features) < min(out_features, in_features):
        return {}
    return {"scalora_U.weight": (out_features, in_features), "scalora_V.weight": (0, in_features)}


def pattern_value(pattern: Mapping[str, int], name: str, default: int) -> int:
    """Return the entry of rank_pattern or alpha_pattern for a saved layer, matched by its name in the base model."""
    # Within an attention that is adapted as a whole, its output projection has a layer of its own.
    name = name.removeprefix(PREFIX).partition(".base_layer.")[0]
    return pattern.get(get_pattern_key(pattern.keys(), name), default)


def check_values(state: Mapping[str, Tensor], source: str) -> None:
    """Check that an adapter's tensors are finite and its progress is possible.

    Raises:
        ValueError: names source, tensor and value.
    """
    for key, tensor in state.items():
        if "lora_" not in key:
            continue  # another module that was trained whole
        if key.endswith(PROGRESS_KEY):
            _check_progress(key, tensor.tolist(), _room(state, key), source)
        elif not tensor.is_floating_point():
            raise ValueError(f"{source} has {key} of {tensor.dtype}, a floating-point tensor was expected. {_REMEDY}")
        elif not tensor.isfinite().all():
            raise ValueError(
                f"{source} has {key} with nan or infinite values: its training diverged, or it is damaged. Use an "
                "earlier checkpoint."
            )


def _check_progress(key: str, numbers: list, room: int, source: str) -> None:
    """Check counts of steps, rescalings and columns; their dtype may be any that whatever handled them has cast to."""
    is_whole = all(isinstance(number, (int, float)) and number >= 0 and number == number // 1 for number in numbers)
    if not (is_whole and numbers[2] <= room):
        raise ValueError(
            f"{source} has {key}={numbers}: whole numbers, 0 or more, were expected, and at most {room} columns in "
            "use. Adapters can be averaged as they are saved if their counts are equal; else combine them by "
            "add_weighted_adapter. If nothing was averaged, the adapter is damaged: fetch or save it again."
        )


def _room(state: Mapping[str, Tensor], key: str) -> int:
    """Return how many columns a layer can have in use; a dense accumulator (V of 0 x in) counts as one.

    `key` is that of the layer's progress.
    """
    V = state.get(key.replace("scalora_progress", "scalora_V"))
    return 2**63 if V is None else V.shape[0] or 1
