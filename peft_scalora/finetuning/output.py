"""Which run an output folder holds: another one is never continued, and other files are never overwritten."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, fields

from ..files.atomic import replace_file
from ..files.checkpoints import METRICS_NAME, last_complete_checkpoint
from ..files.claim import refuse_other_run
from .settings import FinetuneSettings

SETTINGS_NAME = "settings.json"
_LENGTH = {"max_steps", "epochs"}


def is_main_process() -> bool:
    """Return whether this process is the one that writes and speaks; torchrun and accelerate number them in RANK."""
    return os.environ.get("RANK", "0") == "0"


def refuse_foreign_files(output: str) -> None:
    """Refuse an output that is a file, or a folder with files that no run of this command has left.

    Raises:
        OSError: names the output.
    """
    if os.path.lexists(output) and not os.path.isdir(output):
        raise OSError(f"output={output!r} cannot be written to: it is not a folder. Choose another.")
    if not os.path.isdir(output) or not os.listdir(output) or last_complete_checkpoint(output):
        return
    if not any(_read_settings(os.path.join(output, name)) for name in (SETTINGS_NAME, METRICS_NAME)):
        raise FileExistsError(
            f"output={output!r} exists, is not empty and holds no run of this command: choose another folder or "
            "remove it."
        )


def _read_settings(path: str) -> dict | None:
    try:
        with open(path, encoding="utf-8") as file:
            settings = json.load(file)["settings"]
        return settings if {"model", "data", "task"} <= set(settings) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def finished_metrics(settings: FinetuneSettings, data: dict[str, str]) -> dict | None:
    """Return the metrics of the run in the output folder; None if it has not ended, or is to be trained for longer.

    Args:
        data: a hash of the rows of each source, by the name of its setting.

    Raises:
        ValueError: it had other settings or other data.
    """
    path = os.path.join(settings.output, METRICS_NAME)
    if not os.path.exists(path):
        return None
    with open(path, encoding="utf-8") as file:
        metrics = json.load(file)
    there = metrics["settings"]
    longer = _is_longer(settings, there, metrics["steps"])
    _refuse_other_settings(settings, there, "a finished", {"output"} | (_LENGTH if longer else set()))
    _refuse_other_data(settings, metrics.get("data_hashes"), data, "a finished")
    return None if longer else metrics


def _is_longer(settings: FinetuneSettings, there: dict, steps: int) -> bool:
    if settings.max_steps > 0:
        return settings.max_steps > steps
    return there["max_steps"] == -1 and settings.epochs > there["epochs"]


def claim_output(settings: FinetuneSettings, data: dict[str, str], base_fingerprint: dict) -> None:
    """Write down in the output folder which run it holds: its settings, its data and its base model.

    Raises:
        ValueError: the folder holds checkpoints of another run. OSError: it cannot be written to.
    """
    if last_complete_checkpoint(settings.output):
        recorded = _recorded(settings.output)
        _refuse_other_settings(settings, recorded["settings"], "an interrupted", {"output", *_LENGTH})
        _refuse_other_data(settings, recorded.get("data_hashes"), data, "an interrupted")
        _refuse_other_base(settings, recorded["base_fingerprint"], base_fingerprint)
    claim = {"settings": asdict(settings), "data_hashes": data, "base_fingerprint": base_fingerprint}
    if not is_main_process():
        return
    try:
        os.makedirs(settings.output, exist_ok=True)
        replace_file(os.path.join(settings.output, SETTINGS_NAME), json.dumps(claim, indent=1))
    except OSError as error:
        raise OSError(f"output={settings.output!r} cannot be written to: {error}. Choose another folder.") from error


def _recorded(output: str) -> dict:
    try:
        with open(os.path.join(output, SETTINGS_NAME), encoding="utf-8") as file:
            recorded = json.load(file)
        if {"settings", "base_fingerprint"} <= recorded.keys():
            return recorded
        raise KeyError("settings")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(
            f"output={output!r} holds checkpoints, but no {SETTINGS_NAME} that says of which run ({error!r}): choose "
            "another folder, or remove them."
        ) from error


def _refuse_other_settings(settings: FinetuneSettings, there: dict, state: str, may_change: set[str]) -> None:
    there = {field.name: there.get(field.name, field.default) for field in fields(settings)}
    holder = f"output={settings.output!r} holds {state} run"
    refuse_other_run(holder, there, asdict(settings), "use those, or choose another folder", may_change)


def _refuse_other_data(settings: FinetuneSettings, there: dict | None, here: dict, state: str) -> None:
    """Compare where both are known: runs of older versions have no hashes."""
    changed = [name for name in here if there and there.get(name) not in (None, here[name])]
    if changed:
        named = ", ".join(f"{name}={getattr(settings, name)!r}" for name in changed)
        raise ValueError(
            f"output={settings.output!r} holds {state} run, and the rows of {named} have changed since: bring them "
            "back, or choose another folder to train on the new ones."
        )


def _refuse_other_base(settings: FinetuneSettings, there: dict | None, here: dict) -> None:
    from ..files.fingerprint import difference  # it needs PEFT, and the rest of this file is wanted before that

    reason = difference(there, here) if there else None
    if reason:
        raise ValueError(
            f"output={settings.output!r} holds an interrupted run on another base model than model={settings.model!r} "
            f"is now: {reason}. Bring that one back, or choose another folder."
        )
