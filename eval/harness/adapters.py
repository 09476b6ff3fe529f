"""The trained adapter, kept beside the run's JSON: for lm-eval, `peft-scalora export` and serving."""

from __future__ import annotations

import os
import shutil

from baselines import WITHOUT_ADAPTER
from peft import PeftModel

from peft_scalora.files import new_folder

from .record import is_main_process
from .training import UNTRAINED


def adapter_folder(output: str) -> str:
    """Where the adapter of the run with this JSON is kept."""
    return f"{output}.adapter"


def check_adapter(method: str, output: str, finished: dict | None) -> None:
    """
    Raises:
        ValueError: the method has no adapter, or the run is finished and its adapter was not kept.
    """
    if method in (*WITHOUT_ADAPTER, UNTRAINED):
        raise ValueError(f"--save-adapter: method={method!r} has no adapter that fits its unchanged base.")
    if finished is not None and not ("adapter" in finished and os.path.isdir(adapter_folder(output))):
        raise ValueError(f"{output} is finished, and its adapter was not kept: remove it, or choose another --output.")


def save_adapter(model: PeftModel, output: str, result: dict) -> None:
    """Write the adapter whole or not at all, in place of what is there, and note its folder in the run's `result`."""
    result["adapter"] = os.path.basename(adapter_folder(output))
    if is_main_process():
        shutil.rmtree(adapter_folder(output), ignore_errors=True)
        with new_folder(adapter_folder(output)) as folder:
            model.save_pretrained(folder)
