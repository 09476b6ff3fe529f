"""TRL's own training scripts, with a ScaLoRA configuration given in place of their LoRA configuration."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from importlib import import_module

from ..config import ScaLoRAConfig
from .conversion import SETTINGS, to_scalora


def _setting(name: str):
    """Return an option that means a field of ScaLoRAConfig, with that field's help."""
    own = next(f for f in fields(ScaLoRAConfig) if f.name == name)
    return field(default=None, metadata={"help": f"{own.metadata['help']} ScaLoRA's default: {own.default}."})


# TRL's parser evaluates annotations where it finds the class, and takes one type an option.
@dataclass
class ScaLoRAArguments:
    """Options that TRL's command lacks. What is not given keeps the default of ScaLoRAConfig."""

    scaling: str | None = _setting("scaling")
    scaling_interval: int | None = _setting("scaling_interval")
    smoothness: str | None = _setting("smoothness")
    column_norm2: float | None = _setting("column_norm2")
    accumulator: str | None = _setting("accumulator")
    accumulator_rank: int | None = _setting("accumulator_rank")


def run_script(method: str, arguments: list[str]) -> None:
    """Run one of TRL's training scripts in this process, on an adapter of ScaLoRA.

    Args:
        method: name of the script, such as "sft".
        arguments: what `trl METHOD` takes, and the options of ScaLoRAArguments; `--config FILE` may hold both.

    Raises:
        ImportError: TRL is not installed.
        ValueError: a setting is not what it may be.
    """
    try:
        import trl
    except ImportError as error:
        raise ImportError("peft-scalora trl needs TRL: pip install 'peft-scalora[trl]'.") from error
    script = import_module(f"trl.scripts.{method}")
    types = script.make_parser().dataclass_types
    parser = trl.TrlParser([*types, ScaLoRAArguments], prog=f"peft-scalora trl {method}")
    *parsed, own = parser.parse_args_and_config(arguments)
    with _configuration_for(own):
        script.main(*parsed)


@contextmanager
def _configuration_for(own: ScaLoRAArguments):
    """Let TRL's scripts, which look up `trl.get_peft_config` when they run, find one that makes ScaLoRA's."""
    import trl

    original = trl.get_peft_config

    def get_peft_config(model_args):
        model_args.use_peft = True
        return to_scalora(original(model_args), **{name: getattr(own, name) for name in SETTINGS})

    trl.get_peft_config = get_peft_config
    try:
        yield
    finally:
        trl.get_peft_config = original
