"""Every optimizer whose state can be carried through a rescaling, as functions of its parameters.

eps is as good as 0 wherever it enters the state, so that scaling all gradients scales the state and nothing else.
"""

import warnings
from functools import partial

import bitsandbytes
import torch

TINY = 1e-30


class Lion(torch.optim.Optimizer):
    """The published update: sign of an interpolation of momentum and gradient."""

    def __init__(self, params, lr=1e-4, betas=(0.9, 0.99)):
        super().__init__(params, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                exp_avg = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                p.add_(exp_avg.lerp(p.grad, 1 - beta1).sign(), alpha=-group["lr"])
                exp_avg.lerp_(p.grad, 1 - beta2)


class AdamWOfMine(torch.optim.AdamW):
    """Found by its base class."""


TORCH = {
    "Adam": partial(torch.optim.Adam, eps=TINY),
    "Adam amsgrad": partial(torch.optim.Adam, eps=TINY, amsgrad=True),
    "Adam foreach": partial(torch.optim.Adam, eps=TINY, foreach=True),
    "Adam fused": partial(torch.optim.Adam, eps=TINY, fused=True),
    "Adam with a tensor as rate": lambda params, lr=1e-3: torch.optim.Adam(params, lr=torch.tensor(lr), eps=TINY),
    "AdamW": partial(torch.optim.AdamW, eps=TINY),
    "AdamW amsgrad foreach": partial(torch.optim.AdamW, eps=TINY, amsgrad=True, foreach=True),
    "AdamW amsgrad fused": partial(torch.optim.AdamW, eps=TINY, amsgrad=True, fused=True),
    "subclass of AdamW": partial(AdamWOfMine, eps=TINY),
    "NAdam": partial(torch.optim.NAdam, eps=TINY),
    "RAdam": partial(torch.optim.RAdam, eps=TINY),
    "Adamax": partial(torch.optim.Adamax, eps=TINY),
    "Adagrad": partial(torch.optim.Adagrad, eps=TINY),
    "Adagrad fused": partial(torch.optim.Adagrad, eps=TINY, fused=True),
    "RMSprop centered momentum": partial(torch.optim.RMSprop, eps=TINY, centered=True, momentum=0.9),
    "SGD": torch.optim.SGD,
    "SGD momentum": partial(torch.optim.SGD, momentum=0.9),
    "SGD nesterov fused": partial(torch.optim.SGD, momentum=0.9, nesterov=True, fused=True),
    "Muon": torch.optim.Muon,
    "Lion": Lion,
}
BITSANDBYTES_32 = {
    "bnb Adam32bit": partial(bitsandbytes.optim.Adam32bit, eps=TINY),
    "bnb AdamW32bit": partial(bitsandbytes.optim.AdamW32bit, eps=TINY),
    "bnb Lion32bit": bitsandbytes.optim.Lion32bit,
    "bnb SGD32bit": partial(bitsandbytes.optim.SGD32bit, momentum=0.9),
    "bnb RMSprop32bit": partial(bitsandbytes.optim.RMSprop32bit, eps=TINY),
    "bnb Adagrad32bit": partial(bitsandbytes.optim.Adagrad32bit, eps=TINY),
}
# bitsandbytes keeps small parameters in 32 bit unless told otherwise.
BITSANDBYTES_8 = {
    "bnb Adam8bit": partial(bitsandbytes.optim.Adam8bit, eps=TINY, min_8bit_size=1),
    "bnb AdamW8bit": partial(bitsandbytes.optim.AdamW8bit, eps=TINY, min_8bit_size=1),
    "bnb Lion8bit": partial(bitsandbytes.optim.Lion8bit, min_8bit_size=1),
    "bnb SGD8bit": partial(bitsandbytes.optim.SGD8bit, momentum=0.9, min_8bit_size=1),
    "bnb RMSprop8bit": partial(bitsandbytes.optim.RMSprop8bit, eps=TINY, min_8bit_size=1),
    "bnb Adagrad8bit": partial(bitsandbytes.optim.Adagrad8bit, eps=TINY, min_8bit_size=1),
}
OPTIMIZERS = TORCH | BITSANDBYTES_32 | BITSANDBYTES_8


def make(name, params, lr=1e-3):
    params = list(params)
    if "Muon" in name or "SGD" in name:
        return OPTIMIZERS[name](params, lr=lr, weight_decay=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # bitsandbytes: paged and 8-bit optimizers on a CPU
        return OPTIMIZERS[name](params, lr=lr)
