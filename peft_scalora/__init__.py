"""High-rank fine-tuning at LoRA's cost: ScaLoRA for Hugging Face PEFT. Importing registers the method."""

from importlib import import_module

from .config import ScaLoRAConfig
from .register import register
from .rescaling.engine import RescaleReport, last_report, rescale
from .version import __version__

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
__all__ = ["RescaleReport", "ScaLoRAConfig", "__version__", "last_report", "rescale", *_LAZY]

register()


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_LAZY[name]}", __name__), name)
