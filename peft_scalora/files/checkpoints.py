"""Finding the checkpoint to resume from after an interruption."""

from __future__ import annotations

import json
import os
import re

STATE_NAME = "trainer_state.json"
METRICS_NAME = "metrics.json"


def last_complete_checkpoint(folder: str | os.PathLike) -> str | None:
    """Return the newest Trainer checkpoint below `folder` that was written to its end; None if there is none.

    Trainer writes trainer_state.json as the last file of a checkpoint. A process that is killed before leaves a
    checkpoint without that file, or with part of it, and `resume_from_checkpoint=True` would choose it.

    Args:
        folder: the `output_dir` of a Trainer; it need not exist.
    """
    if not os.path.isdir(folder):
        return None
    found = [
        (int(match[1]), match[0]) for match in map(re.compile(r"checkpoint-(\d+)$").match, os.listdir(folder)) if match
    ]
    for step, name in sorted(found, reverse=True):
        if _is_complete(os.path.join(folder, name), step):
            return os.path.join(folder, name)
    return None


def _is_complete(checkpoint: str, step: int) -> bool:
    try:
        with open(os.path.join(checkpoint, STATE_NAME), encoding="utf-8") as file:
            return json.load(file)["global_step"] == step
    except (OSError, ValueError, KeyError):
        return False


def class_names(folder: str) -> list[str] | None:
    """Return the names of the classes of the run in this folder, by their number; None if none are recorded."""
    try:
        with open(os.path.join(folder, METRICS_NAME), encoding="utf-8") as file:
            return [str(label) for label in json.load(file)["labels"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None
