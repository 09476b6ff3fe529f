"""A LoRA configuration that another tool has made, turned into one of ScaLoRA."""

from __future__ import annotations

from dataclasses import fields

from peft import LoraConfig

from ..config import ScaLoRAConfig

# The fields by which a ScaLoRA adapter is trained differently; a tool's settings have them under the same names.
SETTINGS = ("scaling", "scaling_interval", "smoothness", "column_norm2", "accumulator", "accumulator_rank")
# What PEFT fills in by itself.
_NOT_TAKEN = ("peft_type", "auto_mapping", "peft_version")


def to_scalora(config: LoraConfig, **settings) -> ScaLoRAConfig:
    """Return a ScaLoRA configuration that adapts what a LoRA configuration adapts.

    Args:
        config: as a tool makes it of its own settings.
        **settings: values of `SETTINGS`; a number may be given as the string that a command line or a file holds. What
            is None keeps its default.

    Raises:
        ValueError: a setting is unknown or out of its range, or `config` asks for what ScaLoRA does not support.
    """
    unknown = settings.keys() - set(SETTINGS)
    if unknown:
        raise ValueError(f"{', '.join(sorted(unknown))} is no setting of ScaLoRA: there are {', '.join(SETTINGS)}.")
    taken = {f.name: getattr(config, f.name) for f in fields(config) if f.init and f.name not in _NOT_TAKEN}
    given = {name: _as_number(value) for name, value in settings.items() if value is not None}
    return ScaLoRAConfig(**taken | given)


def _as_number(value):
    """Return a string that spells a number as the number, and anything else as it is."""
    for kind in (int, float):
        try:
            return kind(value) if isinstance(value, str) else value
        except ValueError:
            continue
    return value
