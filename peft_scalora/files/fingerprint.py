"""Telling base models apart by the names and shapes of their weights and a few of the values."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable

from torch import Tensor, nn

from .._seams import SEQ_CLS_HEAD_NAMES

_SAMPLED_WEIGHTS = 32
_SAMPLED_PLACES = 8  # where names do not help
# A weight in bfloat16 is within 2^-8 of the one in float32; training on moves most of them further than this.
_RELATIVE, _ABSOLUTE = 2**-7, 1e-6
# Heads that PEFT trains whole: random where the base model has none yet, and with as many rows as there are labels.
_HEADS = {*SEQ_CLS_HEAD_NAMES, "qa_outputs"}
_ADAPTER_PARTS = ("lora_", "modules_to_save", "token_adapter", "trainable_tokens")


def fingerprint(model: nn.Module, modules_to_save: Collection[str] | None = None) -> dict:
    """Return a fingerprint of a base model, by which another one is told from it.

    It is the same with and without adapters, in any floating-point type, and quantized by bitsandbytes or torchao.
    Weights that are quantized, sharded or not in memory have None for values. So have those of `modules_to_save`: the
    adapter brings its own, and where the base model has none they are random at every load.

    Returns:
        "weights": a hash of all names and shapes. "values": two values of each of up to 32 weights, or None.
        "shapes": a hash of all shapes. "values_by_place": two values of each of up to 8 weights chosen by their place.
        The last two are for a model whose weights were renamed, as PEFT's `key_mapping` allows for.
    """
    weights = _base_weights(model)
    shapes = sorted((name, list(_shape(weight))) for name, weight in weights.items())
    by_name = sorted(weights, key=_hash)[:_SAMPLED_WEIGHTS]
    by_place = sorted(range(len(weights)), key=_hash)[:_SAMPLED_PLACES]
    names = list(weights)

    def sampled(chosen: Iterable[str]) -> list[float | None]:
        own = modules_to_save or ()
        pairs = ([None, None] if _in_modules(name, own) else _values(weights[name]) for name in chosen)
        return [value for pair in pairs for value in pair]

    return {
        "weights": _hash(shapes)[:16],
        "values": sampled(by_name),
        "shapes": _hash(sorted(shape for _, shape in shapes))[:16],
        "values_by_place": sampled(names[place] for place in by_place),
    }


def short(recorded: dict) -> str:
    """Return eight letters of a fingerprint, for people to compare."""
    return _hash(recorded)[:8]


def difference(recorded: dict, current: dict) -> str | None:
    """Return in words how the models of two fingerprints differ; None if they do not."""
    values = "values"
    if recorded["weights"] != current["weights"]:
        # Adapters of older releases have recorded the names alone.
        if "shapes" not in recorded or recorded["shapes"] != current.get("shapes"):
            return "its weights have other names or shapes"
        values = "values_by_place"
    pairs = [(a, b) for a, b in zip(recorded[values], current[values]) if a is not None and b is not None]
    other = sum(abs(a - b) > _RELATIVE * max(abs(a), abs(b)) + _ABSOLUTE for a, b in pairs)
    return f"{other} of {len(pairs)} sampled weights have another value" if other else None


def check(recorded) -> None:
    """Refuse a value that is no fingerprint, since adapter_config.json may come from anybody; raises ValueError."""
    if recorded is None:
        return
    hashes, lists = ("weights", "shapes"), ("values", "values_by_place")
    fields = set(recorded) if isinstance(recorded, dict) else set()
    # Adapters of older releases have the first two fields alone.
    known = fields in ({"weights", "values"}, {*hashes, *lists})
    known = known and all(isinstance(recorded[name], str) for name in fields.intersection(hashes))
    if not (known and all(_is_values(recorded[name]) for name in fields.intersection(lists))):
        raise ValueError(
            f"base_fingerprint={recorded!r} is not a fingerprint (expected {{'weights': str, 'values': list}}). Remove "
            "the field to load without this check."
        )


def _is_values(value) -> bool:
    return isinstance(value, list) and all(number is None or isinstance(number, float) for number in value)


def _base_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the base model's weights, by the names that they have without adapters.

    Biases are left out, since they may be trained.
    """
    weights = {}
    for name, parameter in model.named_parameters():
        name = name.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".original_module.", ".")
        in_head = not _HEADS.isdisjoint(name.split("."))
        if name.endswith("weight") and not in_head and not any(part in name for part in _ADAPTER_PARTS):
            weights[name] = parameter
    return weights


def _in_modules(weight: str, modules_to_save: Collection[str]) -> bool:
    """Tell whether a weight is in a module to save.

    PEFT takes every module whose name ends so: "classifier" is "pre_classifier" too.
    """
    parts = weight.split(".")
    return any(".".join(parts[:end]).endswith(tuple(modules_to_save)) for end in range(1, len(parts)))


def _shape(weight: nn.Parameter) -> tuple[int, ...]:
    """Return the shape of a weight before bitsandbytes packed it to 4 bit or DeepSpeed partitioned it."""
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
