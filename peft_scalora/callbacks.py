"""What a Trainer shows of ScaLoRA. Training itself needs no callback."""

from __future__ import annotations

import os
from collections import Counter

from transformers import TrainerCallback

from .plots import plot_lines, require_matplotlib
from .rank import effective_rank
from .rescaling.engine import RescaleReport, last_report

PLOT_NAME = "scalora_rank.png"
MAX_PENDING = 16  # reports whose tensors are kept until figures are wanted


class ScaLoRACallback(TrainerCallback):
    """Logs rank and rescaling figures at every `logging_steps`, and plots them when training ends.

    Figures, under the prefix "scalora/": effective_rank (mean over layers, of the whole weight change), the shares of
    layers by how they were scaled (the labels of `RescaleReport.counts`: `column`, `scalar`, `exact`, `skipped`),
    median_log_alpha, fold_error and discarded (Frobenius norm discarded since training began). They go to the console
    and to trainer_state.json; with the trainer they also go to every integration of `report_to`, which Trainer keeps
    out of a callback's reach:

        trainer = Trainer(...)
        trainer.add_callback(ScaLoRACallback(trainer))

    Args:
        trainer: the Trainer, to log through `trainer.log`.
        tol: singular values above this fraction of a layer's largest count towards its rank.
        plot: write scalora_rank.png to `output_dir` when training ends.

    Raises:
        ImportError: plot is asked for and matplotlib is missing; names the extra.
    """

    def __init__(self, trainer=None, tol: float = 0.01, plot: bool = True):
        self.trainer, self.tol, self.plot = trainer, tol, plot
        if plot:
            require_matplotlib()
        self._seen: RescaleReport | None = None
        self._pending: list[RescaleReport] = []
        self._discarded = 0.0
        self._counts: Counter[str] = Counter()
        self._begin()
        self._history: dict[str, list[tuple[int, float]]] = {}

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        report = last_report(optimizer)
        if report is not None and report is not self._seen:
            self._seen = report
            self._pending.append(report)
        if len(self._pending) == MAX_PENDING:
            self._read_pending()
        self._log(state, control, model)

    def on_epoch_end(self, args, state, control, model=None, **kwargs):
        self._log(state, control, model)

    def _log(self, state, control, model) -> None:
        if self.trainer is not None and control.should_log:
            self.trainer.log(self._figures(model, state.global_step))
            control.should_log = True  # which logging has reset: the loss is still to come

    def on_log(self, args, state, control, model=None, logs=None, **kwargs):
        if self.trainer is None and logs is not None and "loss" in logs:
            figures = self._figures(model, state.global_step)
            logs.update(figures)
            state.log_history[-1].update(figures)

    def on_train_end(self, args, state, control, **kwargs):
        if self.plot and state.is_world_process_zero and self._history:
            plot_lines(os.path.join(args.output_dir, PLOT_NAME), self._panels())

    def _figures(self, model, step: int) -> dict[str, float]:
        adapters = model.active_adapters
        adapters = adapters() if callable(adapters) else adapters  # a method where transformers carries the adapter
        ranks = [rank for adapter in adapters for rank in effective_rank(model, self.tol, adapter).values()]
        figures = {"scalora/effective_rank": sum(ranks) / len(ranks)}
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
        """Figures of the rescalings since the last log."""
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

        return [
            ("Rank of the weight change", "effective rank, mean over layers", series("effective_rank")),
            ("Discarded by recompression", "Frobenius norm, summed", series("discarded")),
            ("How layers were scaled", "share of layers", series(*self._counts)),
        ]
