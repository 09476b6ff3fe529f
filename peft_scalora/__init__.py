"""High-rank fine-tuning at LoRA's cost: ScaLoRA for Hugging Face PEFT. Importing registers the method."""

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING

from .version import __version__

if TYPE_CHECKING:  # lazily imported names, for editors and type checkers
    from .callbacks import ScaLoRACallback as ScaLoRACallback
    from .config import ScaLoRAConfig as ScaLoRAConfig
    from .export.hub import push_to_hub as push_to_hub
    from .export.lora import ExportReport as ExportReport
    from .export.lora import export_lora as export_lora
    from .export.merged import MergeReport as MergeReport
    from .export.merged import export_merged as export_merged
    from .export.sync import lora_state_config as lora_state_config
    from .export.sync import lora_state_dict as lora_state_dict
    from .export.sync import sync_trl_as_lora as sync_trl_as_lora
    from .files.checkpoints import last_complete_checkpoint as last_complete_checkpoint
    from .gauss_newton import GaussNewton as GaussNewton
    from .gauss_newton import GaussNewtonConfig as GaussNewtonConfig
    from .gauss_newton.callback import GaussNewtonCallback as GaussNewtonCallback
    from .rank import effective_rank as effective_rank
    from .rescaling.engine import rescale as rescale
    from .rescaling.hooks import automatic_rescaling as automatic_rescaling
    from .rescaling.hooks import with_rescaling as with_rescaling
    from .rescaling.moments import register_optimizer as register_optimizer
    from .rescaling.report import RescaleReport as RescaleReport
    from .rescaling.steps import last_report as last_report
    from .stability.callbacks import StabilityCallback as StabilityCallback
    from .stability.callbacks import StabilityConfig as StabilityConfig

# Imported on first use: some need parts of transformers that a plain training script does not.
_LAZY = {
    "ExportReport": "export.lora",
    "GaussNewton": "gauss_newton",
    "GaussNewtonCallback": "gauss_newton.callback",
    "GaussNewtonConfig": "gauss_newton",
    "MergeReport": "export.merged",
    "RescaleReport": "rescaling.report",
    "ScaLoRAConfig": "config",
    "ScaLoRACallback": "callbacks",
    "StabilityCallback": "stability.callbacks",
    "StabilityConfig": "stability.callbacks",
    "automatic_rescaling": "rescaling.hooks",
    "effective_rank": "rank",
    "export_lora": "export.lora",
    "export_merged": "export.merged",
    "last_complete_checkpoint": "files.checkpoints",
    "last_report": "rescaling.steps",
    "lora_state_config": "export.sync",
    "lora_state_dict": "export.sync",
    "push_to_hub": "export.hub",
    "register_optimizer": "rescaling.moments",
    "rescale": "rescaling.engine",
    "sync_trl_as_lora": "export.sync",
    "with_rescaling": "rescaling.hooks",
}
__all__ = ["__version__", *_LAZY]


def _is_the_command() -> bool:
    """Return whether this process runs `peft-scalora`, which registers the method once its arguments are understood.

    Importing torch and PEFT takes seconds, and an answer to --help or to a typo must not wait for them.
    """
    words = sys.orig_argv[1:]
    by_module = "-m" in words and words[words.index("-m") + 1 :][:1] == [__name__]
    return by_module or any(os.path.splitext(os.path.basename(word))[0] == "peft-scalora" for word in words[:2])


if not _is_the_command():
    from .register import register

    register()


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_LAZY[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
