"""Watch and clip gradients while a model trains: under Trainer, or in a loop of one's own."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ..callbacks import add_to_log, call_first
from ..files.atomic import replace_file
from ..gauss_newton import GaussNewton
from ..plots import require_matplotlib
from .gradients import PercentileThreshold, clip, clipping_advice, gradient_norms, read_norms
from .instability import TOO_SHORT, Event, InstabilityReport, LossMonitor

logger = logging.getLogger(__name__)
HISTORY_NAME, PLOT_NAME = "stability.json", "stability.png"
_COLUMNS = ("steps", "norms", "thresholds", "group_norms", "loss_steps", "losses")


@dataclass
class StabilityConfig:
    """Set how gradients are clipped, and what is written.

    Attributes:
        percentile: clip at this percentile (above 0, at most 100) of the unclipped norms of all earlier steps; None
            keeps clipping at `max_grad_norm`.
        burn_in: steps before the percentile takes over from `max_grad_norm`.
        calibration: gradient norms of another run of the same model and batch size, or the path of its stability.json:
            the percentile of those is the threshold from the first step on.
        plot: draw stability.png (needs matplotlib).
    """

    percentile: float | None = 90.0
    burn_in: int = 100
    calibration: Sequence[float] | str | os.PathLike | None = None
    plot: bool = True

    def __post_init__(self):
        if self.percentile is not None and not 0 < self.percentile <= 100:
            raise ValueError(f"percentile={self.percentile!r} must be above 0 and at most 100, or None.")
        if self.burn_in < 1:
            raise ValueError(f"burn_in={self.burn_in!r} must be at least 1: a percentile needs a norm.")
        if self.calibration is not None and self.percentile is None:
            raise ValueError("calibration is given with percentile=None: name the percentile to take of it.")
        if isinstance(self.calibration, (str, os.PathLike)):
            self.calibration = os.fspath(self.calibration)  # checkpoints hold the configuration as JSON
        elif self.calibration is not None:
            self.calibration = [float(norm) for norm in self.calibration]
        if self.plot:
            require_matplotlib()


class StabilityMonitor:
    """Record gradient norms, clip, and judge the losses of one run, for a loop of one's own.

        monitor = StabilityMonitor(StabilityConfig(), max_norm=1.0)
        for batch in batches:
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.unscale_gradients()  # mixed precision: norms are those of the true gradients
                monitor.clip(model)
                monitor.add_loss(loss.item())
            optimizer.step()
            optimizer.zero_grad()
        monitor.save("run")
        print(monitor.report().verdict)  # stable, unstable, or too short to tell

    `state_dict` and `load_state_dict` continue it exactly.

    Args:
        config: how to clip.
        max_norm: the threshold before the percentile is known; None clips nothing until then.
    """

    def __init__(self, config: StabilityConfig | None = None, max_norm: float | None = None):
        self.config = config or StabilityConfig()
        calibration = self.config.calibration
        if isinstance(calibration, str):
            calibration = read_norms(calibration)
        self._threshold = PercentileThreshold(self.config.percentile, self.config.burn_in, max_norm, calibration)
        self._losses = LossMonitor()
        self._judged: list[bool] = []  # whether each update was clipped, since the threshold is what it shall be
        self.steps: list[int] = []
        self.norms: list[float] = []
        self.thresholds: list[float | None] = []
        self.group_norms: dict[str, list[float]] = {}
        self.loss_steps: list[int] = []
        self.losses: list[float] = []

    def clip(self, model: nn.Module, step: int | None = None) -> float:
        """Record the norms of the gradients of `model`, clip them, and return the unclipped norm.

        To be called once for each optimizer step, when gradients are complete (accumulated, unscaled, reduced over all
        processes). nan if there are no gradients; then nothing is recorded.
        """
        norm, groups = gradient_norms(model.named_parameters())
        if groups:
            threshold = self._threshold.value()
            self._take(len(self.norms) + 1 if step is None else step, norm, threshold, groups)
            if threshold is not None:
                clip(model.parameters(), norm, threshold)
        return norm

    def add_loss(self, loss: float, step: int | None = None) -> Event | None:
        """Record the training loss of a step, and return the instability that begins with it, if one does."""
        self.loss_steps.append(len(self.losses) + 1 if step is None else step)
        self.losses.append(loss)
        return self._losses.update(loss, self.loss_steps[-1])

    @property
    def clipped(self) -> list[bool]:
        """Return, for each recorded step, whether it was clipped."""
        return [_exceeds(norm, threshold) for norm, threshold in zip(self.norms, self.thresholds)]

    @property
    def clipped_share(self) -> float:
        """Return the share of clipped updates, of those with a threshold that is a percentile (or fixed for good)."""
        return sum(self._judged) / len(self._judged) if self._judged else 0.0

    @property
    def advice(self) -> str | None:
        """Quote what the playbook says about the share of clipped updates, if it says anything."""
        return clipping_advice(self._judged)

    def report(self) -> InstabilityReport:
        """Return the instability found in the losses so far."""
        return self._losses.report()

    def figures(self) -> dict[str, float]:
        """Return what there is to log of the last step."""
        if not self.norms:
            return {}
        figures = {"stability/grad_norm": self.norms[-1], "stability/clipped_share": self.clipped_share}
        if self.thresholds[-1] is not None:
            figures["stability/threshold"] = self.thresholds[-1]
        figures["stability/events"] = len(self.report().events)
        return figures | {f"stability/grad_norm/{name}": norms[-1] for name, norms in self.group_norms.items()}

    def save(self, folder: str | os.PathLike) -> None:
        """Write stability.json (everything recorded) and, if the configuration says so, stability.png."""
        os.makedirs(folder, exist_ok=True)
        replace_file(os.path.join(folder, HISTORY_NAME), json.dumps(self.state_dict()))
        if self.config.plot and self.norms:
            from .plots import plot_run

            plot_run(os.path.join(folder, PLOT_NAME), self)

    def state_dict(self) -> dict:
        """Return everything recorded, as JSON."""
        return {name: getattr(self, name) for name in _COLUMNS}

    def load_state_dict(self, state: dict) -> None:
        """Continue from what `state_dict` returned; to be called before anything is recorded."""
        for i, (step, norm, threshold) in enumerate(zip(state["steps"], state["norms"], state["thresholds"])):
            self._take(step, norm, threshold, {name: norms[i] for name, norms in state["group_norms"].items()})
        for step, loss in zip(state["loss_steps"], state["losses"]):
            self.add_loss(loss, step)

    def _take(self, step: int, norm: float, threshold: float | None, groups: dict[str, float]) -> None:
        counts = norm != 0  # a step without a gradient, as those of Gauss-Newton's line search, says nothing of a norm
        if counts and (self._threshold.adapted or self.config.percentile is None):
            self._judged.append(_exceeds(norm, threshold))
        for name in groups.keys() - self.group_norms.keys():
            self.group_norms[name] = [math.nan] * len(self.norms)
        for name, norms in self.group_norms.items():
            norms.append(groups.get(name, math.nan))
        self.steps.append(step)
        self.norms.append(norm)
        self.thresholds.append(threshold)
        if counts:
            self._threshold.add(norm)


def _exceeds(norm: float, threshold: float | None) -> bool:
    return threshold is not None and math.isfinite(norm) and norm > threshold


class _Off(float):
    """Turn Trainer's clipping off during a step, being 0, and keep the threshold that it stands in for."""

    def __new__(cls, threshold: float):
        off = super().__new__(cls)
        off.threshold = threshold
        return off


class StabilityCallback(TrainerCallback, ExportableState):
    """Take over gradient clipping from Trainer: percentile clipping, norms of every step, loss spikes and divergence.

        trainer = Trainer(...)
        trainer.add_callback(StabilityCallback(trainer=trainer))

    Trainer's own clipping is off in every step, and its `max_grad_norm` is the threshold of the burn-in. Norms are
    those of complete gradients: accumulated, unscaled, reduced. To every log of the training loss it adds, under
    "stability/", the norm overall and by layer, threshold, clipped_share and events. The norms of all steps are in
    `monitor`, in every checkpoint's trainer_state.json (training resumes with them), and in the end in stability.json,
    with stability.png, in `output_dir`. Losses are those that Trainer logs: use `logging_steps=1` to see every spike,
    and `logging_nan_inf_filter=False`, or Trainer hides a loss that is nan.

    Args:
        config: how to clip.
        trainer: to be called before its other callbacks, so that figures reach every integration of `report_to`.

    Raises:
        ValueError: in training, under DeepSpeed or FSDP 1, which clip gradients that nobody else sees.
    """

    def __init__(self, config: StabilityConfig | dict | None = None, trainer=None):
        self.config = StabilityConfig(**config) if isinstance(config, dict) else config or StabilityConfig()
        self.trainer = trainer
        self.monitor = StabilityMonitor(self.config)
        self._advised = False

    def state(self) -> dict:
        """Return what Trainer writes into trainer_state.json."""
        return {"args": {"config": asdict(self.config)}, "attributes": {"history": self.monitor.state_dict()}}

    def on_train_begin(self, args, state, control, **kwargs):
        _refuse_hidden_gradients(args)
        if isinstance(args.max_grad_norm, _Off):  # of an earlier training, which has ended within a step
            args.max_grad_norm = args.max_grad_norm.threshold
        self.monitor = StabilityMonitor(self.config, args.max_grad_norm or None)
        saved = state.stateful_callbacks.get(type(self).__name__)
        if state.global_step > 0 and saved is not None:
            saved = saved[0] if isinstance(saved, list) else saved
            self.monitor.load_state_dict(saved["attributes"]["history"])
        call_first(self, self.trainer)

    def on_step_begin(self, args, state, control, **kwargs):
        args.max_grad_norm = _Off(args.max_grad_norm)  # Trainer then only computes the norm

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        args.max_grad_norm = args.max_grad_norm.threshold
        _refuse_conjugate_gradients(optimizer)
        self.monitor.clip(model, state.global_step + 1)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs is None or "loss" not in logs:
            return
        event = self.monitor.add_loss(float(logs["loss"]), state.global_step)
        add_to_log(self.monitor.figures(), state, logs)
        if state.is_world_process_zero:
            self._warn(event)

    def on_train_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.monitor.save(args.output_dir)
            if self.monitor.report().verdict == TOO_SHORT:
                logger.warning(self.monitor.report().advice)

    def _warn(self, event: Event | None) -> None:
        if event is not None:
            what = "is not finite" if event.kind == "non-finite" else f"has risen by {event.height:.3g}"
            logger.warning(f"The loss {what} at step {event.end}. {self.monitor.report().advice}")
        if self.monitor.advice and not self._advised:
            self._advised = True
            logger.warning(self.monitor.advice)


def _refuse_hidden_gradients(args) -> None:
    if args.deepspeed_plugin is not None:
        raise ValueError(
            "StabilityCallback cannot see or clip gradients under DeepSpeed: remove it, and set gradient_clipping in "
            "DeepSpeed's configuration."
        )
    if (args.fsdp_plugin_args or {}).get("fsdp_version") == 1:
        raise ValueError("StabilityCallback needs FSDP 2: set version=2 in fsdp_config.")


def _refuse_conjugate_gradients(optimizer) -> None:
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
    if isinstance(optimizer, GaussNewton) and optimizer.config.inner_optimizer == "cg":
        raise ValueError(
            "StabilityCallback clips gradients, and inner_optimizer='cg' solves for the unclipped ones: remove it, or "
            "use inner_optimizer='muon' or 'adamw'."
        )
