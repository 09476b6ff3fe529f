"""The trained adapter, kept beside the run's JSON: for lm-eval, `peft-scalora export` and serving."""

from __future__ import annotations

import os
import shutil

from peft import PeftModel

from peft_scalora.files import new_folder

from .record import is_main_process
from .training import UNTRAINED

# What they train is not in an adapter that PEFT loads onto the base as it was.
WITHOUT_ADAPTER = ("full", "galore", "relora", "mora", "pissa", "lora-ga", UNTRAINED)


def adapter_folder(output: str) -> str:
    """Where the adapter of the run with this JSON is kept."""
    return f"{output}.adapter"


def check_adapter(method: str, output: str, finished: bool) -> None:
    """
    Raises:
        ValueError: the method has no adapter, or the run is finished and its adapter was not kept.
    """
    if method in WITHOUT_ADAPTER:
        raise ValueError(f"--save-adapter: method={method!r} has no adapter that fits its unchanged base.")
    if finished and not os.path.isdir(adapter_folder(output)):
        raise ValueError(f"{output} is finished, and its adapter was not kept: remove it, or choose another --output.")


def save_adapter(model: PeftModel, output: str) -> None:
    """Write the adapter whole or not at all; one that this run has left before it was interrupted is replaced."""
    if is_main_process():
        shutil.rmtree(adapter_folder(output), ignore_errors=True)
        with new_folder(adapter_folder(output)) as folder:
            model.save_pretrained(folder)
