"""Tools for training that does not come apart: find the learning rate, see instability, clip, warm up, normalise."""

from importlib import import_module

# Imported on first use: most need parts of transformers, some an extra.
_LAZY = {
    "HiddenStateProbe": "hidden_states",
    "InstabilityReport": "instability",
    "LossMonitor": "instability",
    "StabilityCallback": "callbacks",
    "StabilityConfig": "callbacks",
    "StabilityMonitor": "callbacks",
    "SweepResult": "learning_rate",
    "WarmupResult": "warmup",
    "detect_instability": "instability",
    "load_residual": "residual",
    "make_optimizer": "optimizers",
    "optimizer_class": "optimizers",
    "prepend_warmup": "warmup",
    "scale_residual": "residual",
    "search_warmup": "warmup",
    "sweep_learning_rate": "learning_rate",
    "to_peri_ln": "residual",
}
__all__ = list(_LAZY)


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_LAZY[name]}", __name__), name)
