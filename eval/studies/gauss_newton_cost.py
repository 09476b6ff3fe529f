"""Measure what one inner Gauss-Newton step costs: time and memory over a plain training step.

    export MALLOC_MMAP_THRESHOLD_=17179869184 MALLOC_TRIM_THRESHOLD_=17179869184  # glibc keeps freed memory, as CUDA's
    python -m eval.studies.gauss_newton_cost --repeats 9                                  # allocator does

Plain steps (AdamW, the attention transformers picks) and inner steps (AdamW inside, eager attention) train the same
randomly initialised model on the same batch in turns, in one process. Ratios are taken pair by pair and summarised by
median and quartiles. Memory is the growth of a fresh process's peak while it trains.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import os
import time
from collections.abc import Callable

import torch
from peft import LoraConfig, get_peft_model
from torch.func import functional_call

from eval.harness.timing import quartiles, ratios
from eval.overhead_runs import make_base
from peft_scalora import GaussNewton, GaussNewtonConfig
from peft_scalora.files.atomic import replace_file
from peft_scalora.files.tables import markdown
from peft_scalora.gauss_newton.forward import task_loss

VARIANTS = ("gn", "prox_linear")
TRAINED = ("lora", "full")


def make_model(shape: str, layers: int, trained: str):
    model = make_base(shape, layers, torch.float32, "cpu", False)
    if trained == "lora":
        model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    return model


def plain_step(model, ids: torch.Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def inner_step(model, ids: torch.Tensor, variant: str) -> Callable[[], None]:
    (model.get_base_model() if hasattr(model, "get_base_model") else model).set_attn_implementation("eager")
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    config = GaussNewtonConfig(variant=variant, inner_optimizer="adamw", inner_steps=10**6)
    optimizer, loss = GaussNewton(named, config, lr=1e-4), task_loss(model)

    def step() -> None:
        optimizer.loss(
            lambda params: functional_call(model, params, kwargs={"input_ids": ids}).logits,
            lambda logits: loss(logits, ids),
        ).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def make_step(model, ids: torch.Tensor, name: str) -> Callable[[], None]:
    return plain_step(model, ids) if name == "plain" else inner_step(model, ids, name)


def batch(arguments: argparse.Namespace) -> torch.Tensor:
    return torch.randint(0, 256, (arguments.tokens // arguments.sequence, arguments.sequence))


def seconds(arguments: argparse.Namespace, trained: str) -> dict[str, list[float]]:
    """Return CPU seconds of every step by kind, taken in turns: what else the machine does counts less."""
    model, ids = make_model(arguments.shape, arguments.layers, trained), batch(arguments)
    steps = {name: make_step(copy.deepcopy(model), ids, name) for name in ("plain", *VARIANTS)}
    spent = {name: [] for name in steps}
    for repeat in range(arguments.repeats + 1):
        for name, step in steps.items():
            started = time.process_time()
            step()
            if repeat:  # the first makes the optimizer's state
                spent[name].append(time.process_time() - started)
        print(f"{trained}, repeat {repeat}/{arguments.repeats}", flush=True)
    return spent


def _peak() -> int:
    """Return this process's peak memory in bytes (Linux)."""
    with open("/proc/self/status", encoding="utf-8") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


def _peak_growth(queue, arguments: argparse.Namespace, trained: str, name: str) -> None:
    torch.set_num_threads(1)
    model, ids = make_model(arguments.shape, arguments.layers, trained), batch(arguments)
    before = _peak()
    step = make_step(model, ids, name)
    for _ in range(2):
        step()
    queue.put(_peak() - before)


def peak_growth(arguments: argparse.Namespace, trained: str, name: str) -> int:
    """Return the bytes by which training raises a fresh process's peak above the loaded model."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_peak_growth, args=(queue, arguments, trained, name))
    process.start()
    grown = queue.get()
    process.join()
    return grown


def table(result: dict) -> str:
    """Return a Markdown table of the results by what is trained and by variant."""
    rows = []
    for trained, row in result["results"].items():
        for name in VARIANTS:
            memory = f"{row['bytes'][name] / 2**20:.0f} ({row['bytes']['plain'] / 2**20:.0f})"
            rows.append([trained, name, quartiles(row["time"][name]), memory])
    header = ["trained", "variant", "time of a plain step (quartiles)", "memory of training, MiB (plain)"]
    return markdown(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="smollm2-135m")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=512, help="tokens a step")
    parser.add_argument("--sequence", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--trained", nargs="+", default=TRAINED, choices=TRAINED)
    parser.add_argument("--output", default="results/gauss_newton")
    arguments = parser.parse_args()
    results = {}
    for trained in arguments.trained:
        spent = seconds(arguments, trained)
        results[trained] = {
            "time": {name: ratios(spent[name], spent["plain"]) for name in VARIANTS},
            "seconds": spent,
            "bytes": {name: peak_growth(arguments, trained, name) for name in ("plain", *VARIANTS)},
        }
    settings = vars(arguments) | {"threads": torch.get_num_threads(), "torch": torch.__version__}
    result = {"settings": settings, "results": results}
    os.makedirs(arguments.output, exist_ok=True)
    replace_file(os.path.join(arguments.output, "cost.json"), json.dumps(result, indent=1))
    replace_file(os.path.join(arguments.output, "cost.md"), table(result) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
