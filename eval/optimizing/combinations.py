"""Quantization of models that another method has made smaller: the savings multiply."""

from __future__ import annotations

from .common import Row
from .quantization import ROWS as QUANTIZED
from .quantization import build, load, misfit

__all__ = ["ROWS", "build", "load", "misfit"]


def _then(first: str, quantization: str, caveat: str) -> Row:
    return Row(caveat, first, QUANTIZED[quantization].options)


ROWS = {
    "neurons, bnb-nf4+scalora": _then("neurons", "bnb-nf4+scalora", "one recovery for both losses, at the end"),
    "layers+scalora, torchao-int8": _then("layers+scalora", "torchao-int8", "recovered before it is quantized"),
    "distilled, torchao-int8": _then("distilled", "torchao-int8", "as distilled"),
    "distilled, torchao-int4": _then("distilled", "torchao-int4", "as torchao-int4"),
    "l1-70+scalora, torchao-int8": _then("l1-70+scalora", "torchao-int8", "zeros stay zeros, and take 8 bits each"),
}
