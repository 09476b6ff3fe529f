"""Keep training from coming apart: find the learning rate, see instability, clip, warm up, normalise."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # lazily imported names, for editors and type checkers
    from .callbacks import StabilityCallback as StabilityCallback
    from .callbacks import StabilityConfig as StabilityConfig
    from .callbacks import StabilityMonitor as StabilityMonitor
    from .hidden_states import HiddenStateProbe as HiddenStateProbe
    from .instability import InstabilityReport as InstabilityReport
    from .instability import LossMonitor as LossMonitor
    from .instability import detect_instability as detect_instability
    from .learning_rate import SweepResult as SweepResult
    from .learning_rate import sweep_learning_rate as sweep_learning_rate
    from .optimizers import make_optimizer as make_optimizer
    from .optimizers import optimizer_class as optimizer_class
    from .residual import load_residual as load_residual
    from .residual import scale_residual as scale_residual
    from .residual import to_peri_ln as to_peri_ln
    from .warmup import WarmupResult as WarmupResult
    from .warmup import prepend_warmup as prepend_warmup
    from .warmup import search_warmup as search_warmup

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


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
