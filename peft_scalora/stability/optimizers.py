"""Make the playbook's optimizers by name. All are torch's; where torch's update differs, it is said here.

g is the gradient, η the learning rate. The playbook starts from v₀ = 0 unless it says otherwise.

- sgd, momentum, nesterov: the same, v ← γ v + g, θ ← θ - η v (Nesterov: θ ← θ - η (γ v + g)).
- rmsprop: the playbook has v₀ = 1 and ε inside the root, m ← γ m + η g / sqrt(v + ε); torch has v₀ = 0, ε outside, and
  applies η to the momentum buffer as a whole, so that a new η scales old contributions too.
- adam: the playbook corrects the bias of the whole step, η sqrt(1-β₂ᵗ)/(1-β₁ᵗ) m/(sqrt(v) + ε); torch adds ε to
  the corrected root, which is the same with an ε of sqrt(1-β₂ᵗ) times as much.
- nadam: the playbook has (β₁ m + (1-β₁) g), bias-corrected as Adam's; torch has Dozat's schedule of β₁, which grows
  from β₁/2, with corrections of its own. The two differ mostly in the first few hundred steps.
- adamw: not in the playbook; Adam with weight decay apart from the gradient.
- muon: not in the playbook; torch.optim.Muon, for matrices only.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict]] = {
    "sgd": (torch.optim.SGD, {}),
    "momentum": (torch.optim.SGD, {"momentum": 0.9}),
    "nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "rmsprop": (torch.optim.RMSprop, {"alpha": 0.9, "momentum": 0.9}),
    "adam": (torch.optim.Adam, {}),
    "nadam": (torch.optim.NAdam, {}),
    "adamw": (torch.optim.AdamW, {}),
    "muon": (torch.optim.Muon, {}),
}


def optimizer_class(name: str, learning_rate: float, **options) -> tuple[type[torch.optim.Optimizer], dict]:
    """Return class and arguments of an optimizer, for `Trainer(optimizer_cls_and_kwargs=...)`.

    Args:
        name: a key of `OPTIMIZERS`.
        options: torch's arguments, over the defaults there.

    Raises:
        ValueError: the name is not known.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer={name!r} must be one of {', '.join(OPTIMIZERS)}.")
    cls, defaults = OPTIMIZERS[name]
    return cls, {"lr": learning_rate, **defaults, **options}


def make_optimizer(
    name: str, parameters: Iterable[nn.Parameter], learning_rate: float, **options
) -> torch.optim.Optimizer:
    """Make an optimizer of `optimizer_class` over the parameters that require a gradient.

    Raises:
        ValueError: the name is not known, or muon is asked for parameters that are no matrices.
    """
    parameters = [p for p in parameters if p.requires_grad]
    if name == "muon" and any(p.ndim != 2 for p in parameters):
        shapes = sorted({tuple(p.shape) for p in parameters if p.ndim != 2})
        raise ValueError(
            f"optimizer='muon' updates matrices only, and there are parameters of shape {shapes[:3]}: give it the "
            "matrices (the factors of an adapter are), and the rest to adamw."
        )
    cls, arguments = optimizer_class(name, learning_rate, **options)
    return cls(parameters, **arguments)
