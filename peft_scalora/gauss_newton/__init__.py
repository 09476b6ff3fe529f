"""Gauss-Newton training (arXiv 2510.09378) of adapters and of whole models."""

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
