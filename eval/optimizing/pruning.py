"""Pruning by magnitude with torch.nn.utils.prune: single weights, which leaves zeros, and whole neurons and heads.

Neurons and heads are zeroed first, by their importance (see shrink.py), and then really taken out: the smaller model
computes what the zeroed one does.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from . import shrink
from .common import Context, Row, count, heads, linear_names, load, save

__all__ = ["ROWS", "build", "load", "misfit"]

_ZEROS = "zeros are stored and multiplied like other numbers: neither smaller nor faster with dense kernels"
ROWS = {
    "l1-20": Row(_ZEROS, options={"part": "weights", "amount": 0.2}),
    "l1-50": Row(_ZEROS, options={"part": "weights", "amount": 0.5}),
    "l1-70": Row(_ZEROS, options={"part": "weights", "amount": 0.7}),
    "l1-70+scalora": Row(f"merging fills the zeros, so they are set again after it; {_ZEROS}", "l1-70"),
    "heads": Row(
        "BERT with fewer heads is no configuration of transformers: it loads through this package",
        options={"part": "heads", "amount": 1 / 3},
    ),
    "heads+scalora": Row("as heads", "heads"),
    "neurons": Row(
        "every layer loses as many, so that it stays an ordinary model", options={"part": "neurons", "amount": 1 / 3}
    ),
    "neurons+scalora": Row("as neurons", "neurons"),
}


def misfit(row: Row, base: nn.Module) -> str | None:
    if not row.options:  # recovery of a model that was pruned
        return None
    part = row.options["part"]
    if part == "weights":
        return None if prunable(base) else "it has no linear layer to prune"
    reason = shrink.misfit(base)
    if reason is None and part == "heads":
        groups = shrink.head_groups(base.config)
        if shrink.kept_count(groups, row.options["amount"]) == groups:
            reason = f"of {groups} groups of heads in a layer none goes at an amount of {row.options['amount']:.2f}"
    return reason


def build(row: Row, context: Context, folder: str) -> nn.Module:
    model = context.base(row)
    if not row.options:
        model = recovered(model, context)
    elif row.options["part"] == "weights":
        prune_weights(model, row.options["amount"])
    else:
        model = prune_units(model, row.options["part"], row.options["amount"])
    save(model, folder)
    return model


def prunable(model: nn.Module) -> list[str]:
    """Return the names of the linear layers whose weights may go: all but the head."""
    kept = heads(model)
    return [name for name in linear_names(model) if name not in kept]


def prune_weights(model: nn.Module, amount: float) -> None:
    """Set the `amount` of smallest weights of every linear layer but the head to zero, for good."""
    for name in prunable(model):
        module = model.get_submodule(name)
        prune.l1_unstructured(module, "weight", amount)
        prune.remove(module, "weight")


def zero_units(model: nn.Module, part: str, amount: float) -> None:
    """Zero the columns that read the least important neurons or heads of every layer, for good."""
    for name, stay in shrink.read_columns(model, part, amount).items():
        module = model.get_submodule(name)
        prune.custom_from_mask(module, "weight", stay.expand_as(module.weight))
        prune.remove(module, "weight")


def prune_units(model: nn.Module, part: str, amount: float) -> nn.Module:
    """Return the model without the least important neurons or heads of every layer."""
    zero_units(model, part, amount)
    return shrink.without_zero_columns(model, part)


def recovered(model: nn.Module, context: Context) -> nn.Module:
    """Return the pruned model after ScaLoRA, with its zeros where they were.

    What it would be without setting the zeros again goes into the run's figures.
    """
    masks = {name: model.get_submodule(name).weight.ne(0) for name in prunable(model)}
    sparse = any(not bool(mask.all()) for mask in masks.values())
    model = context.recover(model)
    if sparse:
        refilled = context.task.score(model, "test")
        context.figures["merged_without_mask"] = refilled.metrics | count(model)
        set_zeros(model, masks)
    return model


@torch.no_grad()
def set_zeros(model: nn.Module, masks: dict[str, Tensor]) -> None:
    for name, mask in masks.items():
        weight = model.get_submodule(name).weight
        weight.mul_(mask.to(weight.device))
