"""Telling base models apart by the names and shapes of their weights and a few of the values."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection

from torch import Tensor, nn

from .._seams import SEQ_CLS_HEAD_NAMES

_SAMPLED_WEIGHTS = 32
# A weight in bfloat16 is within 2^-8 of the one in float32; training on moves most of them further than this.
_RELATIVE, _ABSOLUTE = 2**-7, 1e-6
# Heads that PEFT trains whole: random where the base model has none yet, and with as many rows as there are labels.
_HEADS = {*SEQ_CLS_HEAD_NAMES, "qa_outputs"}
_ADAPTER_PARTS = ("lora_", "modules_to_save", "token_adapter", "trainable_tokens")


def fingerprint(model: nn.Module, modules_to_save: Collection[str] | None = None) -> dict:
    """{"weights": hash of all names and shapes, "values": two values of each of up to 32 weights, or None}.

    The same for a model with and without adapters, in any floating-point type, and quantized by bitsandbytes or
    torchao: weights that are quantized, sharded or not in memory have None for values. So have those of
    `modules_to_save`: the adapter brings its own, and where the base model has none they are random at every load.
    """
    weights = _base_weights(model)
    shapes = sorted((name, list(_shape(weight))) for name, weight in weights.items())
    sampled = sorted(weights, key=lambda name: _hash(name))[:_SAMPLED_WEIGHTS]
    values = []
    for name in sampled:
        values += [None, None] if _in_modules(name, modules_to_save or ()) else _values(weights[name])
    return {"weights": _hash(shapes)[:16], "values": values}


def short(recorded: dict) -> str:
    """Eight letters of a fingerprint, for people."""
    return _hash(recorded)[:8]


def difference(recorded: dict, current: dict) -> str | None:
    """What tells the two models apart, in words; None if nothing does."""
    if recorded["weights"] != current["weights"]:
        return "its weights have other names or shapes"
    pairs = [(a, b) for a, b in zip(recorded["values"], current["values"]) if a is not None and b is not None]
    other = sum(abs(a - b) > _RELATIVE * max(abs(a), abs(b)) + _ABSOLUTE for a, b in pairs)
    return f"{other} of {len(pairs)} sampled weights have another value" if other else None


def check(recorded) -> None:
    """Raises ValueError for what is no fingerprint: it may come from anybody's adapter_config.json."""
    if recorded is None:
        return
    known = isinstance(recorded, dict) and recorded.keys() == {"weights", "values"}
    if not (
        known
        and isinstance(recorded["weights"], str)
        and isinstance(recorded["values"], list)
        and all(value is None or isinstance(value, float) for value in recorded["values"])
    ):
        raise ValueError(f"base_fingerprint={recorded!r} is none: remove it to load the adapter without that check.")


def _base_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that the model has without adapters, by the names they have then. Biases may be trained."""
    weights = {}
    for name, parameter in model.named_parameters():
        name = name.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".original_module.", ".")
        in_head = not _HEADS.isdisjoint(name.split("."))
        if name.endswith("weight") and not in_head and not any(part in name for part in _ADAPTER_PARTS):
            weights[name] = parameter
    return weights


def _in_modules(weight: str, modules_to_save: Collection[str]) -> bool:
    """PEFT takes every module whose name ends so: "classifier" is "pre_classifier" too."""
    parts = weight.split(".")
    return any(".".join(parts[:end]).endswith(tuple(modules_to_save)) for end in range(1, len(parts)))


def _shape(weight: nn.Parameter) -> tuple[int, ...]:
    """As without quantization (bitsandbytes packs 4-bit weights) and partitioning (DeepSpeed empties its tensors)."""
    quant_state = getattr(weight, "quant_state", None)
    return tuple(quant_state.shape if quant_state is not None else getattr(weight, "ds_shape", weight.shape))


def _values(weight: nn.Parameter) -> list[float | None]:
    plain = type(weight) in (nn.Parameter, Tensor) and weight.is_floating_point()
    if not plain or weight.is_meta or not weight.numel():
        return [None, None]
    flat = weight.detach().flatten()
    return flat[[len(flat) // 3, 2 * len(flat) // 3]].float().tolist()


def _hash(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
