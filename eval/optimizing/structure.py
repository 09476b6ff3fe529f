"""Smaller architectures that keep what weights they can: fewer layers, and narrower ones."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F

from . import shrink
from .common import Context, Row, load, save
from .pruning import prune_units

__all__ = ["ROWS", "build", "load", "misfit"]

ROWS = {
    "layers": Row("what the dropped layers did is lost: recover", options={"part": "layers", "amount": 1 / 3}),
    "layers+scalora": Row("as fast and small as layers", "layers"),
    "width": Row(
        "norms see fewer features, so all layers change: nothing works before recovery",
        options={"part": "width", "amount": 1 / 3},
    ),
    "width+scalora": Row("loses most, at any budget where the others recover", "width"),
}


def misfit(row: Row, base: nn.Module) -> str | None:
    reason = shrink.misfit(base)
    if reason or not row.options:
        return reason
    amount = row.options["amount"]
    size = base.config.num_hidden_layers if row.options["part"] == "layers" else shrink.head_groups(base.config)
    if shrink.kept_count(size, amount) == size:
        units = "layers" if row.options["part"] == "layers" else "groups of heads"
        return f"of {size} {units} none goes at an amount of {amount:.2f}"
    return None


def build(row: Row, context: Context, folder: str) -> nn.Module:
    model = context.base(row)
    if not row.options:
        model = context.recover(model)
    elif row.options["part"] == "layers":
        kept = influential_layers(model, context.task.batch(context.task.train[:32]), row.options["amount"])
        context.figures["kept_layers"] = kept
        model = shrink.keep_layers(model, kept)
    else:
        model = narrow(model, row.options["amount"])
    save(model, folder)
    return model


@torch.no_grad()
def influential_layers(model: nn.Module, batch: dict, amount: float) -> list[int]:
    """Return the layers to keep: those that turn the hidden state most, by 1 - cos(input, output), and the last.

    This is the block influence of ShortGPT (arXiv 2403.03853, eq. 1). The last layer always stays, as what follows it
    was trained on its output alone.
    """
    batch = {name: t.to(model.device) for name, t in batch.items() if name != "labels"}
    states = model(**batch, output_hidden_states=True).hidden_states
    real = batch["attention_mask"].bool()
    turned = [1 - F.cosine_similarity(a[real].float(), b[real].float(), dim=-1).mean() for a, b in pairwise(states)]
    turned[-1] = torch.tensor(float("inf"))
    return shrink.strongest(torch.stack(turned), shrink.kept_count(len(turned), amount)).tolist()


def narrow(model: nn.Module, amount: float) -> nn.Module:
    """Return the model with fewer heads, neurons and hidden features, each by importance, all by about `amount`."""
    groups = shrink.head_groups(model.config)
    hidden = model.config.hidden_size // groups * shrink.kept_count(groups, amount)
    for part in ("heads", "neurons"):
        model = prune_units(model, part, amount)
    scores = shrink.hidden_importance(model.state_dict(), shrink.layout_of(model))
    return shrink.keep_hidden(model, shrink.strongest(scores, hidden))
