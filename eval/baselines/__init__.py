"""Every method that can be trained by `--method NAME`, made ready from a plain model.

A method is a function (model, settings, batches) -> Prepared; `METHODS` is the one list of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from . import peft_methods
from .full import full, galore
from .mora import mora
from .relora import relora
from .shared import Prepared

METHODS: dict[str, Callable] = {
    "full": full,
    "galore": galore,
    "lora": peft_methods.lora,
    "lora-2r": partial(peft_methods.wider_lora, 2),
    "lora-4r": partial(peft_methods.wider_lora, 4),
    "rslora": peft_methods.rslora,
    "dora": peft_methods.dora,
    "pissa": peft_methods.pissa,
    "lora-ga": peft_methods.lora_ga,
    "eva": peft_methods.eva,
    "relora": relora,
    "mora": mora,
    "hira": peft_methods.hira,
    "gralora": peft_methods.gralora,
    "randlora": peft_methods.randlora,
    "fourierft": peft_methods.fourierft,
    "scalora": peft_methods.scalora,
    "qlora": peft_methods.qlora,
    "qscalora": peft_methods.qscalora,
}

# What these train is not in an adapter that PEFT loads onto the base as it was.
WITHOUT_ADAPTER = ("full", "galore", "relora", "mora", "pissa", "lora-ga")


def prepare(model: torch.nn.Module, settings, batches: Sequence[dict]) -> Prepared:
    """Return `model` ready to be trained by `settings.method`; `batches` of its data are for data-driven inits.

    Raises:
        ValueError: the method does not fit the model.
    """
    return METHODS[settings.method](model, settings, batches)
