"""What the others are measured against: the model after full fine-tuning, and after LoRA and ScaLoRA, merged."""

from __future__ import annotations

from torch import nn

from .common import Context, Row, load, save

__all__ = ["ROWS", "build", "load", "misfit"]

ROWS = {
    "dense": Row("trains every weight: optimizer state of twice the model", None, {"method": "full"}),
    "lora": Row("cheap to train and to keep unmerged; merged as large and slow as dense", None, {"method": "lora"}),
    "scalora": Row("as lora, and the change has a higher rank", None, {"method": "scalora"}),
}


def misfit(row: Row, base: nn.Module) -> str | None:
    return None


def build(row: Row, context: Context, folder: str) -> nn.Module:
    model, method = context.base(row), row.options["method"]
    model = context.fine_tune(model, method) if method == "full" else context.recover(model, method)
    save(model, folder)
    return model
