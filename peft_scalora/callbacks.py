"""Show in a Trainer's logs what ScaLoRA does. Training itself needs no callback."""

from __future__ import annotations

import os
from collections import Counter

from transformers import TrainerCallback

from .layer import ScaLoRALayer
from .plots import plot_lines, require_matplotlib
from .rank import effective_rank
from .rescaling.report import RescaleReport
from .rescaling.steps import last_report

PLOT_NAME = "scalora_rank.png"
MAX_PENDING = 16  # reports whose tensors are kept until figures are wanted


class ScaLoRACallback(TrainerCallback):
    """Add rank and rescaling figures to every log of the training loss, and plot them when training ends.

    Figures, under the prefix "scalora/": effective_rank (mean over layers, of the whole weight change), the share of
    layers whose base weight holds accumulated change as `merged` (the others keep it beside them), the shares of
    layers by how they were scaled (the labels of `RescaleReport.counts`: `column`, `scalar`, `exact`, `skipped`),
    median_log_alpha, fold_error and discarded (Frobenius norm discarded since training began). A plain LoRA adapter has
    the first of them alone. They go to trainer_state.json and to callbacks that were added later; with the trainer they
    go to every callback, also to the integrations of `report_to`:

        trainer = Trainer(...)
        trainer.add_callback(ScaLoRACallback(trainer))

    Args:
        trainer: the Trainer, to be called before its other callbacks.
        tol: singular values above this fraction of a layer's largest count towards its rank.
        plot: write scalora_rank.png to `output_dir` when training ends.

    Raises:
        ImportError: plot is asked for and matplotlib is missing; names the extra.
    """

    def __init__(self, trainer=None, tol: float = 0.01, plot: bool = True):
        self.trainer = trainer
        self.tol = tol
        self.plot = plot
        if plot:
            require_matplotlib()
        self._seen: RescaleReport | None = None
        self._pending: list[RescaleReport] = []
        self._discarded = 0.0
        self._counts: Counter[str] = Counter()
        self._begin()
        self._history: dict[str, list[tuple[int, float]]] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        call_first(self, self.trainer)

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        report = last_report(optimizer)
        if report is not None and report is not self._seen:
            self._seen = report
            self._pending.append(report)
        if len(self._pending) == MAX_PENDING:
            self._read_pending()

    def on_log(self, args, state, control, model=None, logs=None, **kwargs):
        if logs is not None and "loss" in logs:
            add_to_log(self._figures(model, state.global_step), state, logs)

    def on_train_end(self, args, state, control, **kwargs):
        if self.plot and state.is_world_process_zero and self._history:
            plot_lines(os.path.join(args.output_dir, PLOT_NAME), self._panels())

    def _figures(self, model, step: int) -> dict[str, float]:
        adapters = model.active_adapters
        adapters = adapters() if callable(adapters) else adapters  # a method where transformers carries the adapter
        ranks = []
        for adapter in adapters:
            ranks += effective_rank(model, self.tol, adapter).values()
        merged = [m.merged_base is not None for m in model.modules() if isinstance(m, ScaLoRALayer)]
        figures = {"scalora/effective_rank": sum(ranks) / len(ranks)}
        if merged:
            figures["scalora/merged"] = sum(merged) / len(merged)
        self._read_pending()
        if self._layers:
            figures |= {f"scalora/{label}": count / self._layers for label, count in self._counts.items()}
            figures["scalora/median_log_alpha"] = self._seen.median_log_alpha
            figures["scalora/fold_error"] = self._fold_error
            figures["scalora/discarded"] = self._discarded
            self._begin()
        for name, value in figures.items():
            self._history.setdefault(name, []).append((step, value))
        return figures

    def _begin(self) -> None:
        """Begin to add up the rescalings of the next log."""
        self._layers = 0
        self._counts = Counter(dict.fromkeys(self._counts, 0))
        self._fold_error = 0.0

    def _read_pending(self) -> None:
        """Add the reports to the figures, which waits for the device, and let go of their tensors."""
        for report in self._pending:
            self._layers += report.layers
            self._counts.update(report.counts)
            self._fold_error = max(self._fold_error, report.fold_error)
            self._discarded += report.discarded
        self._pending.clear()

    def _panels(self) -> list:
        def series(*names: str) -> dict:
            found = {name: self._history.get(f"scalora/{name}", []) for name in names}
            return {name.replace("_", " "): tuple(zip(*points)) for name, points in found.items() if points}

        panels = [
            ("Rank of the weight change", "effective rank, mean over layers", series("effective_rank")),
            ("Discarded by recompression", "Frobenius norm, summed", series("discarded")),
            ("How layers were scaled", "share of layers", series(*self._counts)),
        ]
        return [panel for panel in panels if panel[-1]]


def call_first(callback: TrainerCallback, trainer) -> None:
    """Let a Trainer, if there is one, call this callback before all others, which then see what it adds to a log.

    A log of its own would not do: a Trainer of TRL adds its metrics to the first log of a step, which is to be the one
    with the loss.
    """
    if trainer is not None:
        handler = trainer.callback_handler
        handler.callbacks = [callback, *(other for other in handler.callbacks if other is not callback)]


def add_to_log(figures: dict[str, float], state, logs: dict) -> None:
    """Add figures to what is being logged, and to the entry of the log history that was made of it."""
    logs.update(figures)
    state.log_history[-1].update(figures)
