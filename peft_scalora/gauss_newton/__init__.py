"""Gauss-Newton training (arXiv 2510.09378) of adapters and of whole models."""

from ..rescaling.moments import register_optimizer
from .config import GaussNewtonConfig
from .grouping import layers_of, matrix_names
from .linearize import ggn_product, linearized_loss_and_grad
from .optimizer import GaussNewton

__all__ = [
    "GaussNewton",
    "GaussNewtonConfig",
    "ggn_product",
    "layers_of",
    "linearized_loss_and_grad",
    "matrix_names",
]

# The moments of the inner optimizers; δ moves against the gradients, so that J δ stays as it is.
register_optimizer(GaussNewton, {"exp_avg": 1, "exp_avg_sq": 2, "momentum_buffer": 1, "delta": -1})
