"""Measure what ScaLoRA costs over LoRA: step time, memory, checkpoint size, and where a rescaling spends its time.

All methods train the same randomly initialised model on the same batch, interleaved in one process, so that what the
machine does besides hits all of them. Ratios to LoRA are taken pair by pair and summarised by median and quartiles.

    python -m eval.overhead --shape smollm2-135m --tokens 512 --r 8 --repeats 7 --output results/overhead

ScaLoRA's accumulators are full (all R columns in use, recompression at every rescaling): the cost of a long run, not
of its cheap beginning. Interval I is computed from steps without and with a rescaling, t + (t_rescaling - t) / I.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import platform
import statistics
from collections.abc import Callable
from unittest import mock

import torch
import transformers
from peft import get_peft_model_state_dict

import peft_scalora
import peft_scalora.rescaling.engine as engine
from eval.harness.memory import peak_bytes
from eval.harness.timing import quartiles, ratios, timed, with_interval
from eval.overhead_runs import SHAPES, Run, configurations, make_base, make_run
from peft_scalora import ScaLoRAConfig
from peft_scalora.files.atomic import replace_file
from peft_scalora.files.tables import markdown
from peft_scalora.plots import require_matplotlib, save_png

INTERVALS = (1, 10)


def measure(base, configs: dict, ids: torch.Tensor, repeats: int, device: str) -> dict:
    """Return seconds of every step by method, and bytes of memory and of the checkpoint."""
    runs, memory, sizes = {}, {}, {}
    for name, config in configs.items():
        gc.collect()
        runs[name] = make_run(base, config, ids)
        sizes[name] = sum(t.nbytes for t in get_peft_model_state_dict(runs[name].model).values())
        memory[name] = memory_of(runs[name], ids)
    seconds = {name: [] for name in runs}
    # Recompression takes turns with a plain fold: two steps of each method make one measurement.
    for repeat in range(repeats):
        for name, run in runs.items():
            seconds[name].append(statistics.mean(timed(device, lambda run=run: run.step(ids)) for _ in range(2)))
        print(
            f"repeat {repeat + 1}/{repeats}: " + ", ".join(f"{n} {s[-1]:.3f}" for n, s in seconds.items()), flush=True
        )
    return {"seconds": seconds, "memory_bytes": memory, "checkpoint_bytes": sizes, "runs": runs}


def summarize(seconds: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    without, rescaling = seconds["scalora, no rescaling"], seconds["scalora, rescaling"]
    rows = {name: values for name, values in seconds.items() if not name.startswith("scalora")}
    rows |= {f"scalora I={i}": with_interval(without, rescaling, i) for i in INTERVALS}
    rows["scalora, no rescaling"] = without
    return {name: {"seconds": statistics.median(v), **ratios(v, seconds["lora"])} for name, v in rows.items()}


PARTS = {"solve": "scaling", "fold": "fold", "accumulate": "recompression", "carry": "transport"}


def split_rescaling(run: Run, ids: torch.Tensor, repeats: int, device: str) -> dict[str, float]:
    """Return mean seconds of the parts of one rescaling, each timed to its end; every second one recompresses."""
    spent = {name: [] for name in (*PARTS.values(), "whole")}
    run.model(input_ids=ids, labels=ids).loss.backward()
    for _ in range(2 * repeats):
        total = dict.fromkeys(PARTS.values(), 0.0)

        def wrap(name: str, original: Callable, total: dict = total) -> Callable:
            def call(*args):
                out = []
                total[PARTS[name]] += timed(device, lambda: out.append(original(*args)))
                return out[0]

            return call

        with contextlib.ExitStack() as stack:
            for name in PARTS:
                stack.enter_context(mock.patch.object(engine, name, wrap(name, getattr(engine, name))))
            whole = timed(device, lambda: peft_scalora.rescale(run.model, run.optimizer))
        for name, value in (*total.items(), ("whole", whole)):
            spent[name].append(value)
    run.optimizer.zero_grad()
    return {name: statistics.mean(values) for name, values in spent.items()}


def memory_of(run: Run, ids: torch.Tensor) -> dict[str, int]:
    """Return bytes: what the adapter keeps, the peak a step adds to it and, of ScaLoRA, a rescaling adds."""
    kept = sum(t.nbytes for t in get_peft_model_state_dict(run.model).values())
    state = sum(v.nbytes for s in run.optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor))
    memory = {"adapter": kept, "optimizer": state, "step": peak_bytes(lambda: run.step(ids))}
    if isinstance(run.model.peft_config["default"], ScaLoRAConfig):
        run.model(input_ids=ids, labels=ids).loss.backward()
        calls = [peak_bytes(lambda: peft_scalora.rescale(run.model, run.optimizer)) for _ in range(2)]
        memory["rescaling"] = max(calls)
        run.optimizer.zero_grad()
    return memory


def floor(base, r: int, rank: int, tokens: int, device: str) -> dict[str, float]:
    """Return the seconds that the accumulated change must cost a step, at this machine's rates of copy and product."""
    size = 2**24 if device == "cpu" else 2**28
    source = torch.randn(size, device=device)
    target = torch.empty_like(source)
    copy_rate = 2 * source.nbytes / min(timed(device, lambda: target.copy_(source)) for _ in range(5))
    side = 1024 if device == "cpu" else 8192
    matrix = torch.randn(side, side, device=device, dtype=base.dtype)
    flop_rate = 2 * side**3 / min(timed(device, lambda: matrix @ matrix) for _ in range(5))
    shapes = [m.weight.shape for n, m in base.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    features = sum(out + inp for out, inp in shapes)
    forward_backward = 4 * tokens * rank * features / flop_rate  # x V', h U' and their input gradients
    rescaling = (
        features * (2 * rank + 12 * r) * 4 / copy_rate
    )  # U, V, factors, gradients and two moments, read or written
    return {
        "copy_bytes_per_second": copy_rate,
        "flops": flop_rate,
        "accumulated_forward_backward_seconds": forward_backward,
        "rescaling_seconds": rescaling,
    }


def draw(path: str, summary: dict, title: str) -> None:
    """Plot step time over LoRA by method, with quartiles."""
    names = [name for name in summary if name != "lora"]
    figure, axis = require_matplotlib().subplots(figsize=(7, 3.6))
    medians = [summary[name]["median"] for name in names]
    spread = [
        [summary[name]["median"] - summary[name]["low"] for name in names],
        [summary[name]["high"] - summary[name]["median"] for name in names],
    ]
    colours = ["tab:orange" if name.startswith("scalora") else "tab:gray" for name in names]
    axis.barh(names, medians, xerr=spread, color=colours, height=0.6)
    axis.axvline(1, color="tab:blue", linewidth=1.2)
    axis.set(xlabel="step time over LoRA's, median and quartiles", title=title)
    axis.spines[["top", "right"]].set_visible(False)
    save_png(figure, path)


def total_memory(memory: dict[str, int], base: int) -> int:
    """Return peak bytes of training: what stays, and the larger of what a step and a rescaling add."""
    return base + memory["adapter"] + memory["optimizer"] + max(memory["step"], memory.get("rescaling", 0))


def table(result: dict) -> str:
    """Return a Markdown table of time, memory and checkpoint size by method."""
    memory = {name: total_memory(m, result["base_bytes"]) for name, m in result["memory_bytes"].items()}
    rows = []
    for name, row in result["summary"].items():
        key = "scalora, rescaling" if name.startswith("scalora I") else name
        size = f"{result['checkpoint_bytes'][key] / 2**20:.1f}"
        rows.append([name, quartiles(row), f"{memory[key] / memory['lora']:.3f}", size])
    header = ["method", "step time over LoRA (quartiles)", "peak memory over LoRA", "checkpoint, MiB"]
    return markdown(header, rows)


def parse() -> argparse.Namespace:
    """Return what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--tokens", type=int, default=512, help="tokens a step")
    parser.add_argument("--sequence", type=int, default=256)
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--accumulator-rank", type=int, help="R; 8 r unless given")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--methods", nargs="+", help="only these beside LoRA and ScaLoRA")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--output", default="runs/overhead")
    return parser.parse_args()


def measure_all(arguments: argparse.Namespace, device: str) -> dict:
    """Return seconds, memory and sizes of every method, with what they were measured on."""
    shape = SHAPES[arguments.shape]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    base = make_base(shape, arguments.layers, dtype, device, arguments.checkpointing)
    rows = max(1, arguments.tokens // arguments.sequence)
    ids = torch.randint(0, shape[5], (rows, arguments.tokens // rows), device=device)
    configs = configurations(arguments.r, arguments.accumulator_rank)
    if arguments.methods is not None:
        configs = {n: c for n, c in configs.items() if n == "lora" or n.startswith("scalora") or n in arguments.methods}
    measured = measure(base, configs, ids, arguments.repeats, device)
    runs = measured.pop("runs")
    return {
        "settings": vars(arguments) | {"device": device, "dtype": str(dtype), "threads": torch.get_num_threads()},
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "summary": summarize(measured["seconds"]),
        "rescaling_seconds": split_rescaling(runs["scalora, rescaling"], ids, 3, device),
        "floor": floor(base, arguments.r, arguments.accumulator_rank, arguments.tokens, device),
        "base_bytes": sum(p.nbytes for p in base.parameters()),
        **measured,
    }


def main() -> None:
    arguments = parse()
    arguments.accumulator_rank = arguments.accumulator_rank or 8 * arguments.r
    device = "cuda" if torch.cuda.is_available() else "cpu"
    result = measure_all(arguments, device)
    os.makedirs(arguments.output, exist_ok=True)
    replace_file(os.path.join(arguments.output, "overhead.json"), json.dumps(result, indent=1))
    sizes = f"{arguments.tokens} tokens, r = {arguments.r}, R = {arguments.accumulator_rank}"
    draw(os.path.join(arguments.output, "overhead.png"), result["summary"], f"{arguments.shape}, {sizes}, {device}")
    print(f"\n{table(result)}\n\none rescaling, seconds: {json.dumps(result['rescaling_seconds'])}")
    print(f"floor: {json.dumps(result['floor'])}")


if __name__ == "__main__":
    main()
