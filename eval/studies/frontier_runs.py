"""The runs of the frontier study: their settings, and the file that holds one line a run."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field

# The seed that chooses the learning rate; others tell the loss at it.
SEARCH_SEED = 0


@dataclass(frozen=True)
class Method:
    """An adapter and the optimizer that trains it.

    Attributes:
        adapter: "lora", "scalora" or "full" (the same weights themselves), which share a forward pass, or another name
            of eval.baselines.
        options: further fields of the adapter's configuration.
        optimizer: "adamw" or "muon".
        start: step before which a ScaLoRA adapter is not rescaled.
        interval: steps from one rescaling to the next.
        first_rate: index of the learning rate at which a search begins.
    """

    adapter: str
    options: Mapping = field(default_factory=dict)
    optimizer: str = "adamw"
    start: int = 0
    interval: int = 10
    first_rate: int = -7

    @property
    def is_shared(self) -> bool:
        """Return whether several runs share one forward pass."""
        return self.adapter in ("lora", "scalora", "full")

    @property
    def kind(self) -> tuple:
        """Return what the runs of one population have in common, besides their rank and length."""
        adapter = "factors" if self.adapter in ("lora", "scalora") else self.adapter
        return adapter, self.options.get("lora_alpha"), self.optimizer, self.interval


def _scalora(scaling: str, norm2: float | None = None, options: Mapping | None = None, **settings) -> Method:
    return Method("scalora", {"scaling": scaling, "column_norm2": norm2} | (options or {}), **settings)


METHODS = {
    "full": Method("full", first_rate=-10),
    "LoRA": Method("lora"),
    "LoRA, Muon": Method("lora", optimizer="muon"),
    "ScaLoRA column": _scalora("column"),
    "ScaLoRA column, norm² 1": _scalora("column", 1.0),
    "ScaLoRA column, start 75": _scalora("column", start=75),
    "ScaLoRA column, Muon": _scalora("column", optimizer="muon"),
    "ScaLoRA shrink, norm² 1/3": _scalora("shrink", 1 / 3),
    "ScaLoRA shrink": _scalora("shrink", 1.0),
    "ScaLoRA shrink, norm² 3": _scalora("shrink", 3.0),
    "ScaLoRA shrink, I = 1": _scalora("shrink", 1.0, interval=1),
    "ScaLoRA shrink, Muon": _scalora("shrink", 1.0, optimizer="muon"),
    **{f"ScaLoRA shrink, R = {R}": _scalora("shrink", 1.0, {"accumulator_rank": R}) for R in (4, 8, 16, 28)},
    # In place of r = 4 with a full accumulator beside the base weight: a rank of 9 r, with the alpha of r = 4.
    "rsLoRA": Method("lora", {"use_rslora": True, "lora_alpha": 8}),
    "PiSSA": Method("lora", {"init_lora_weights": "pissa_niter_16"}, first_rate=-10),
    "DoRA": Method("dora"),
    "HiRA": Method("hira", first_rate=-5),
    "MoRA": Method("mora", first_rate=-9),
    "ReLoRA": Method("relora"),
    "GraLoRA": Method("gralora"),
}


@dataclass(frozen=True)
class Run:
    """Settings of one run. `rate` is the index of the learning rate on the grid of ratio 10^(1/4)."""

    suite: str
    method: str
    r: int
    steps: int
    rate: int
    seed: int

    @property
    def learning_rate(self) -> float:
        """Return 10^(rate / 4)."""
        return 10 ** (self.rate / 4)


def read_runs(path: str) -> dict[Run, dict]:
    """Return the finished runs of a results file: settings -> the whole line."""
    if not os.path.exists(path):
        return {}
    names = Run.__dataclass_fields__
    with open(path, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file if line.strip()]
    return {Run(**{name: row[name] for name in names}): row for row in rows}


def append_runs(path: str, runs: Iterable[Run], results: Iterable[dict]) -> None:
    """Add finished runs to a results file. A loss that is not finite is written as null."""
    lines = []
    for run, result in zip(runs, results, strict=True):
        rounded = {name: round(value, 5) if math.isfinite(value) else None for name, value in result.items()}
        lines.append(json.dumps({**asdict(run), **rounded}, ensure_ascii=False) + "\n")
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write("".join(lines))
