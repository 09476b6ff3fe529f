"""One JSON a run: what it was, on what, and what came out; a run that failed leaves one too."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import platform
import resource
import shutil
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version

import torch

from peft_scalora.files.atomic import replace_file
from peft_scalora.files.claim import refuse_other_run

from .ranks import this_process

PACKAGES = ("torch", "transformers", "peft", "peft-scalora", "accelerate", "datasets", "numpy", "scikit-learn", "scipy")
FINISHED, FAILED = "finished", "failed"


def environment() -> dict:
    """Return versions, machine and number of processes."""
    cuda = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if cuda else platform.machine(),
        "threads": torch.get_num_threads(),
        "processes": this_process().num_processes,
        **{name: _version(name) for name in PACKAGES},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def clock() -> float:
    """Return seconds: of this process's CPU time where it computes on the CPU, which others do not disturb."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def peak_memory_bytes() -> int:
    """Return the most that was allocated on the GPU, or the process's largest resident size without one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def is_main_process() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


def finished(path: str, task: str, settings: dict, data: dict) -> dict | None:
    """Return the finished run at `path`, or None if there is none or it failed.

    Raises:
        ValueError: a run of another task, with other settings or of other rows is there.
    """
    if not os.path.exists(path):
        return None
    result = read(path)
    if result["status"] != FINISHED:
        return None
    here = _identity(task, settings, data, this_process().num_processes)
    refuse_other_run(f"{path} is a run", _identity_of(result), here, "choose another --output")
    return result


def _identity(task: str, settings: dict, data: dict, processes: int) -> dict:
    """Return what makes a run what it is; the batch of a step is that of all processes."""
    return {**settings, "task": task, "data": data, "processes": processes}


def _identity_of(recorded: dict) -> dict:
    return _identity(recorded["task"], recorded["settings"], recorded["data"], recorded["environment"]["processes"])


@contextmanager
def recorded(path: str, task: str, settings: dict, data: dict) -> Iterator[dict]:
    """Yield a dict for the results of a run, and write it to `path` when the block ends, however it ends.

    `data` tells the rows (`Rows.record`): with the task and the settings it makes a run what it is.

    What the run needs to be continued belongs into the folder `checkpoints(path)`, removed once it is finished.

    Raises:
        ValueError: an interrupted run of another task, with other settings or of other rows is there.
    """
    folder = checkpoints(path)
    _claim(folder, task, settings, data)
    result = {"task": task, "status": FAILED, "settings": settings, "environment": environment(), "data": data}
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


def read(path: str) -> dict:
    """Return a run's JSON."""
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def read_all(folder: str, names: str = "*.json") -> list[dict]:
    """Return the JSONs in a folder, by their names."""
    return [read(path) for path in sorted(glob.glob(os.path.join(glob.escape(folder), names)))]


def kept(path: str, settings: dict, make: Callable[[], dict]) -> dict:
    """Return the result that is at `path`, or make one and write it there with its settings.

    Raises:
        ValueError: the result at `path` is of a run with other settings.
    """
    if os.path.exists(path):
        result = read(path)
        refuse_other_run(f"{path} holds a run", result["settings"], settings, "choose another --output")
        return result
    result = {"settings": settings, **make()}
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    replace_file(path, json.dumps(result, indent=1))
    return result


def short_hash(value) -> str:
    """Return 16 hex digits that tell one JSON value from another."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def to_json(result: dict) -> str:
    """Write one field a line: long lists stay on theirs."""
    fields = (f" {json.dumps(name)}: {json.dumps(value)}" for name, value in result.items())
    return "{\n" + ",\n".join(fields) + "\n}\n"


def checkpoints(path: str) -> str:
    """Return the folder of an unfinished run: Trainer's checkpoints, and what is scored already."""
    return f"{path}.checkpoints"


def _claim(folder: str, task: str, settings: dict, data: dict) -> None:
    """Make the folder, or see that it is of this run."""
    path = os.path.join(folder, "run.json")
    claim = {"task": task, "settings": settings, "environment": environment(), "data": data}
    if os.path.exists(path):
        holder = f"{folder} is of an interrupted run"
        refuse_other_run(holder, _identity_of(read(path)), _identity_of(claim), "remove it, or choose another --output")
    elif is_main_process():
        os.makedirs(folder, exist_ok=True)
        replace_file(path, to_json(claim))
