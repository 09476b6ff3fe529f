"""Settings of Gauss-Newton training, and those of the published study."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .linearize import VARIANTS

INNER_OPTIMIZERS = ("muon", "adamw", "cg")
INNER_SCHEDULES = ("constant", "cosine")

# arXiv 2510.09378 by model size: fields of GaussNewtonConfig, and of TrainingArguments. At its large batches a constant
# rate with a cosine in each inner loop is best, at medium ones a global cosine.
_STUDY = {
    "45m": (
        {"inner_steps": 122, "inner_schedule": "constant", "line_search_points": 5},
        {
            "learning_rate": 1e-2,
            "lr_scheduler_type": "cosine",
            "per_device_train_batch_size": 32,
            "max_grad_norm": 1.0,
            "weight_decay": 1e-3,
        },
    ),
    "150m": (
        {"inner_steps": 1831, "inner_schedule": "cosine", "anchor_l2": 0.01, "line_search_points": 10},
        {"learning_rate": 3e-3, "lr_scheduler_type": "constant", "per_device_train_batch_size": 128},
    ),
}


@dataclass(frozen=True)
class GaussNewtonConfig:
    """Settings of Gauss-Newton training (arXiv 2510.09378).

    One outer step is `inner_steps` + `line_search_steps` steps.

    Learning rate, its global schedule, weight decay and gradient clipping are not here: they are the optimizer's
    (`GaussNewton(lr=..., weight_decay=...)`) or Trainer's (`TrainingArguments`).

    Args:
        variant: "gn" minimises the quadratic model of the loss, "prox_linear" the loss of the linearized network.
        layerwise: linearize one layer at a time (embedding, each block, head); an inner step then costs as many passes.
        inner_optimizer: "muon" (matrices; AdamW for the rest), "adamw", or "cg": conjugate gradients on the quadratic
            model of the step's batch, with Levenberg-Marquardt damping.
        inner_steps: N, steps on fresh batches from one outer step to the next. 1 is usual for "cg".
        inner_schedule: "cosine" lowers the learning rate to 0 within each inner loop, on top of the global schedule.
        anchor_l2: factor of ½‖δ‖², added to the objective.
        line_search_points: p; the step sizes tried are 2^(-i/2) for i < p, and 0.
        line_search_steps: steps whose fresh batches choose the step size.
        cg_iterations: products with the Gauss-Newton matrix a step ("cg" only).
        damping: first λ of JᵀHJ + λI ("cg" only); afterwards Levenberg-Marquardt's rule moves it.

    Raises:
        ValueError: names a field out of its range, or two that do not go together.
    """

    variant: Literal["gn", "prox_linear"] = "gn"
    layerwise: bool = False
    inner_optimizer: Literal["muon", "adamw", "cg"] = "muon"
    inner_steps: int = 32
    inner_schedule: Literal["constant", "cosine"] = "cosine"
    anchor_l2: float = 0.0
    line_search_points: int = 5
    line_search_steps: int = 1
    cg_iterations: int = 10
    damping: float = 1e-2

    def __post_init__(self):
        choices = {"variant": VARIANTS, "inner_optimizer": INNER_OPTIMIZERS, "inner_schedule": INNER_SCHEDULES}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {', '.join(map(repr, allowed))}.")
        for name in ("inner_steps", "line_search_points", "line_search_steps", "cg_iterations"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}={value!r} must be a whole number, 1 or more.")
        for name in ("anchor_l2", "damping"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)!r} must be a number, 0 or more.")
        if self.inner_optimizer == "cg" and (self.variant != "gn" or self.layerwise):
            raise ValueError(
                "inner_optimizer='cg' solves the quadratic model of the whole network: use it with variant='gn' and "
                "layerwise=False, or choose 'muon' or 'adamw'."
            )

    @classmethod
    def study(cls, size: Literal["45m", "150m"], **changes) -> tuple[GaussNewtonConfig, dict]:
        """Return the settings published for a model of that size, and the fields of TrainingArguments that they need.

            config, arguments = GaussNewtonConfig.study("45m", layerwise=True)
            Trainer(model, TrainingArguments("run", **arguments), ..., callbacks=[GaussNewtonCallback(config)])

        Args:
            size: "45m" or "150m", in parameters.
            **changes: fields of the config to replace.

        Raises:
            ValueError: no settings are published for that size.
        """
        if size not in _STUDY:
            raise ValueError(f"size={size!r} must be one of {', '.join(map(repr, _STUDY))}.")
        fields, arguments = _STUDY[size]
        return cls(**fields | changes), dict(arguments)
