"""One run of a script: found finished, or made now, with the trained adapter kept beside its JSON if that is wanted."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable

import torch

from eval.baselines import WITHOUT_ADAPTER
from peft_scalora.files.atomic import new_folder

from .options import Place, parse
from .record import finished, is_main_process, recorded
from .training import UNTRAINED, Training


def adapter_folder(output: str) -> str:
    """Return where the run's adapter is kept: for lm-eval, `peft-scalora export` and serving."""
    return f"{output}.adapter"


def run_once(
    output: str,
    task: str,
    settings: dict,
    data: dict,
    make: Callable[[dict], torch.nn.Module],
    keep_adapter: bool = False,
) -> dict:
    """Return the finished run at `output`, or the one that `make` makes: it fills the result and returns the model.

    Raises:
        ValueError: the run at `output` is another one, or its adapter is wanted and was not kept or there is none.
    """
    method = settings["method"]
    if keep_adapter and method in (*WITHOUT_ADAPTER, UNTRAINED):
        raise ValueError(f"--save-adapter: method={method!r} has no adapter that fits its unchanged base.")
    found = finished(output, task, settings, data)
    if found is not None:
        if keep_adapter and not ("adapter" in found and os.path.isdir(adapter_folder(output))):
            raise ValueError(
                f"{output} is finished, and its adapter was not kept: remove it, or choose another --output."
            )
        return found
    with recorded(output, task, settings, data) as result:
        model = make(result)
        if keep_adapter:
            _save_adapter(model, output, result)
    return result


def run_command(description: str, kind: type, run: Callable[..., dict], **defaults) -> None:
    """Read a script's command line, run it, and print its metrics.

    Args:
        description: of the script.
        kind: the dataclass of what is evaluated.
        run: makes the run of (evaluation, training, data folder, the run's JSON, whether the adapter is kept).
        defaults: defaults of options that are not those of their fields.
    """
    evaluation, settings, place = parse(description, (kind, Training, Place), **defaults)
    result = run(evaluation, settings, place.data_dir, place.output, place.save_adapter)
    if is_main_process():
        print(json.dumps(result["metrics"], indent=1))


def _save_adapter(model, output: str, result: dict) -> None:
    """Write the adapter whole or not at all, in place of what is there, and note its folder in the run's result."""
    result["adapter"] = os.path.basename(adapter_folder(output))
    if is_main_process():
        shutil.rmtree(adapter_folder(output), ignore_errors=True)
        with new_folder(adapter_folder(output)) as folder:
            model.save_pretrained(folder)
