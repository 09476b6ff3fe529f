"""One JSON a run: what it was, on what, and what came out; a run that failed leaves one too."""

from __future__ import annotations

import json
import os
import platform
import resource
import shutil
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version

import torch

from peft_scalora.files import replace_file

PACKAGES = ("torch", "transformers", "peft", "peft-scalora", "accelerate", "datasets", "numpy", "scikit-learn", "scipy")
FINISHED, FAILED = "finished", "failed"


def environment() -> dict:
    """Versions and machine of this process."""
    cuda = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if cuda else platform.machine(),
        "threads": torch.get_num_threads(),
        "processes": int(os.environ.get("WORLD_SIZE", 1)),
        **{name: _version(name) for name in PACKAGES},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def clock() -> float:
    """Seconds: of this process's CPU time where it computes on the CPU, which others on the machine do not disturb."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def peak_memory_bytes() -> int:
    """The most that was allocated on the GPU, or the largest resident size of this process without one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def is_main_process() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


def finished(path: str, settings: dict) -> dict | None:
    """The finished run at `path`; None if there is none or it failed.

    Raises:
        ValueError: a run with other settings is there.
    """
    if not os.path.exists(path):
        return None
    with open(path, encoding="utf-8") as file:
        result = json.load(file)
    if result["status"] != FINISHED:
        return None
    changed = [name for name, value in settings.items() if result["settings"].get(name) != value]
    if changed:
        raise ValueError(f"{path} is a run with other settings ({', '.join(changed)}): choose another --output.")
    return result


@contextmanager
def recorded(path: str, task: str, settings: dict) -> Iterator[dict]:
    """Yield a dict for the results of a run, and write it to `path` when the block ends, however it ends.

    What the run needs to be continued belongs into the folder `checkpoints(path)`, removed once it is finished.

    Raises:
        ValueError: an interrupted run with other settings is there.
    """
    folder = checkpoints(path)
    _claim(folder, settings)
    result = {"task": task, "status": FAILED, "settings": settings, "environment": environment()}
    try:
        yield result
        result["status"] = FINISHED
    except BaseException as error:
        result["error"] = "".join(traceback.format_exception_only(error)).strip()
        raise
    finally:
        if is_main_process():
            replace_file(path, to_json(result))
            if result["status"] == FINISHED:
                shutil.rmtree(folder)


def to_json(result: dict) -> str:
    """One field a line: long lists stay on theirs."""
    fields = (f" {json.dumps(name)}: {json.dumps(value)}" for name, value in result.items())
    return "{\n" + ",\n".join(fields) + "\n}\n"


def checkpoints(path: str) -> str:
    """The folder of an unfinished run: Trainer's checkpoints, and what is scored already."""
    return f"{path}.checkpoints"


def _claim(folder: str, settings: dict) -> None:
    """Make the folder, or see that it is of a run with these settings."""
    path = os.path.join(folder, "settings.json")
    known = json.loads(json.dumps(settings))
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
        changed = [name for name in known | found if known.get(name) != found.get(name)]
        if changed:
            raise ValueError(
                f"{folder} is of an interrupted run with other settings ({', '.join(changed)}): remove it, or choose "
                "another --output."
            )
    elif is_main_process():
        os.makedirs(folder, exist_ok=True)
        replace_file(path, json.dumps(known, indent=1))
