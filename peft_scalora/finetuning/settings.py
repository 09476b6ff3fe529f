"""The settings of a fine-tuning run, and telling which run an output folder holds."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, fields

from ..files.atomic import replace_file
from ..files.checkpoints import METRICS_NAME, last_complete_checkpoint
from ..files.fingerprint import difference

TASKS = ("causal-lm", "classification")
METHODS = ("scalora", "lora")
SETTINGS_NAME = "settings.json"


@dataclass
class FinetuneSettings:
    """Everything that decides a run; saved with its results."""

    model: str
    data: str
    task: str
    output: str
    method: str = "scalora"
    eval_data: str | None = None
    test_data: str | None = None
    text_fields: tuple[str, ...] = ()
    label_field: str = ""
    prompt_field: str = ""
    completion_field: str = ""
    r: int = 8
    lora_alpha: int = 16
    lora_dropout: float = 0.0
    target_modules: str = "all-linear"
    scaling: str = "column"
    scaling_interval: int = 10
    smoothness: float | str = "auto"
    accumulator_rank: int | None = None
    learning_rate: float = 2e-4
    batch_size: int = 8
    gradient_accumulation_steps: int = 1
    epochs: float = 1.0
    max_steps: int = -1
    warmup_ratio: float = 0.05
    weight_decay: float = 0.0
    max_length: int = 512
    eval_rows: int = 500
    logging_steps: int = 10
    save_steps: int = 200
    seed: int = 0
    bf16: bool = False

    def __post_init__(self):
        for name, choices in (("task", TASKS), ("method", METHODS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {', '.join(choices)}.")
        if self.eval_rows < 1:
            raise ValueError(f"eval_rows={self.eval_rows!r} must be 1 or more: a run is evaluated at its end.")


def finished_metrics(settings: FinetuneSettings) -> dict | None:
    """The metrics of the run in the output folder, None if it has not ended.

    Raises:
        ValueError: it had other settings.
    """
    path = os.path.join(settings.output, METRICS_NAME)
    if not os.path.exists(path):
        return None
    with open(path, encoding="utf-8") as file:
        metrics = json.load(file)
    _refuse_other_settings(settings, metrics["settings"], "a finished", may_change={"output"})
    return metrics


def claim_output(settings: FinetuneSettings, base_fingerprint: dict | None = None) -> None:
    """Write down in the output folder which run it holds: its settings and, once it is loaded, its base model.

    Raises:
        ValueError: the folder holds checkpoints of another run. OSError: it cannot be written to.
    """
    recorded = {}
    if last_complete_checkpoint(settings.output):
        recorded = _recorded(settings.output)
        may_change = {"output", "max_steps", "epochs"}
        _refuse_other_settings(settings, recorded["settings"], "an interrupted", may_change)
        _refuse_other_base(settings, recorded["base_fingerprint"], base_fingerprint)
    claim = {
        "settings": asdict(settings),
        "base_fingerprint": base_fingerprint or recorded.get("base_fingerprint"),
    }
    try:
        os.makedirs(settings.output, exist_ok=True)
        replace_file(os.path.join(settings.output, SETTINGS_NAME), json.dumps(claim, indent=1))
    except OSError as error:
        raise OSError(f"output={settings.output!r} cannot be written to: {error}. Choose another folder.") from error


def _recorded(output: str) -> dict:
    try:
        with open(os.path.join(output, SETTINGS_NAME), encoding="utf-8") as file:
            recorded = json.load(file)
        return {name: recorded[name] for name in ("settings", "base_fingerprint")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"output={output!r} holds checkpoints, but no {SETTINGS_NAME} that says of which run ({error!r}): choose "
            "another folder, or remove them."
        ) from error


def _refuse_other_settings(settings: FinetuneSettings, there: dict, state: str, may_change: set[str]) -> None:
    here = json.loads(json.dumps(asdict(settings)))
    there = {field.name: there.get(field.name, field.default) for field in fields(settings)}
    changed = sorted(name for name in here if name not in may_change and here[name] != there[name])
    if changed:
        named = ", ".join(f"{name}={there[name]!r} there, {here[name]!r} here" for name in changed)
        raise ValueError(
            f"output={settings.output!r} holds {state} run with other settings ({named}): use those, or choose another "
            "folder."
        )


def _refuse_other_base(settings: FinetuneSettings, there: dict | None, here: dict | None) -> None:
    reason = difference(there, here) if there and here else None
    if reason:
        raise ValueError(
            f"output={settings.output!r} holds an interrupted run on another base model than model={settings.model!r} "
            f"is now: {reason}. Bring that one back, or choose another folder."
        )
