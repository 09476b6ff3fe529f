"""What a saved model is worth and what it costs, found out in a process that knows nothing but the folder."""

from __future__ import annotations

import importlib
import multiprocessing
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import asdict

import torch
from torch import nn

from eval.harness.record import clock, peak_memory_bytes

from . import common
from .tasks import Task, TaskSettings, load_task

for package in ("torchao", "bitsandbytes"):  # what a package takes itself is no part of a model's memory
    with suppress(ImportError):
        importlib.import_module(package)

ROUNDS, SECONDS, BATCH = 5, 1.0, 8


def in_fresh_process(settings: TaskSettings, task: Task, loader: str, folder: str, dense: str) -> dict:
    """Score, memory and times of the model that module `loader` loads from `folder`, beside those of `dense`.

    The process is a child of a server that has imported this module and never saw a model.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    batch = {name: t.tolist() for name, t in task.batch(task.test[:BATCH]).items()}
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(measure, settings, batch, loader, folder, dense).result()


@torch.no_grad()
def measure(settings: TaskSettings, batch: dict, loader: str, folder: str, dense: str) -> dict:
    """Measure memory on `batch`, before any rows are read, which take more than a small model; then the rest."""
    tensors = {name: torch.tensor(values) for name, values in batch.items()}
    method = importlib.import_module(loader)
    before = peak_memory_bytes()
    model = common.on_device(method.load(folder))
    model(**{name: t.to(model.device) for name, t in tensors.items()})
    memory = peak_memory_bytes() - before
    task = load_task(settings)
    score = task.score(model, "test")
    return {"score": asdict(score), "memory_bytes": memory, **times(model, common.on_device(common.load(dense)), task)}


def times(model: nn.Module, dense: nn.Module, task) -> dict[str, float]:
    """Return medians over rounds in which both models take turns.

    latency_ratio: seconds for one row, over the dense model's. throughput_ratio: rows a second in batches of BATCH.
    """
    figures = {}
    for name, rows in {"latency": task.test[:1], "batch": task.test[:BATCH]}.items():
        batch = {key: t.to(model.device) for key, t in task.batch(rows).items() if key != "labels"}
        rounds = interleaved(lambda m, b=batch: m(**b), [model, dense])
        own, others = zip(*rounds)
        figures[f"{name}_seconds"] = statistics.median(own)
        figures[f"{name}_ratio"] = statistics.median(a / b for a, b in rounds)
        figures[f"dense_{name}_seconds"] = statistics.median(others)
    return {
        "latency_seconds": figures["latency_seconds"],
        "latency_ratio": figures["latency_ratio"],
        "rows_per_second": len(task.test[:BATCH]) / figures["batch_seconds"],
        "throughput_ratio": 1 / figures["batch_ratio"],
    }


def interleaved(function: Callable, arguments: list) -> list[tuple[float, ...]]:
    """Return seconds of `function` for every argument in turn: ROUNDS times at least, and SECONDS long."""

    def turn() -> tuple[float, ...]:
        seconds = []
        for argument in arguments:
            started = clock()
            function(argument)
            seconds.append(clock() - started)
        return tuple(seconds)

    turn()
    rounds, started = [], clock()
    while len(rounds) < ROUNDS or clock() - started < SECONDS:
        rounds.append(turn())
    return rounds
