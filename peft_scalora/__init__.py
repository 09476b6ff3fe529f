"""High-rank fine-tuning at LoRA's cost: ScaLoRA for Hugging Face PEFT. Importing registers the method."""

from importlib import import_module
from typing import TYPE_CHECKING

from .config import ScaLoRAConfig
from .register import register
from .rescaling.engine import RescaleReport, last_report, rescale
from .rescaling.moments import register_optimizer
from .version import __version__

if TYPE_CHECKING:  # lazily imported names, for editors and type checkers
    from .callbacks import ScaLoRACallback as ScaLoRACallback
    from .export.hub import push_to_hub as push_to_hub
    from .export.lora import ExportReport as ExportReport
    from .export.lora import export_lora as export_lora
    from .export.merged import MergeReport as MergeReport
    from .export.merged import export_merged as export_merged
    from .files.checkpoints import last_complete_checkpoint as last_complete_checkpoint
    from .gauss_newton import GaussNewton as GaussNewton
    from .gauss_newton import GaussNewtonConfig as GaussNewtonConfig
    from .gauss_newton.callback import GaussNewtonCallback as GaussNewtonCallback
    from .rank import effective_rank as effective_rank
    from .stability.callbacks import StabilityCallback as StabilityCallback
    from .stability.callbacks import StabilityConfig as StabilityConfig

# Imported on first use: they need parts of transformers that a plain training script does not.
_LAZY = {
    "ExportReport": "export.lora",
    "GaussNewton": "gauss_newton",
    "GaussNewtonCallback": "gauss_newton.callback",
    "GaussNewtonConfig": "gauss_newton",
    "MergeReport": "export.merged",
    "ScaLoRACallback": "callbacks",
    "StabilityCallback": "stability.callbacks",
    "StabilityConfig": "stability.callbacks",
    "effective_rank": "rank",
    "export_lora": "export.lora",
    "export_merged": "export.merged",
    "last_complete_checkpoint": "files.checkpoints",
    "push_to_hub": "export.hub",
}
__all__ = ["RescaleReport", "ScaLoRAConfig", "__version__", "last_report", "register_optimizer", "rescale", *_LAZY]

register()


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_LAZY[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
