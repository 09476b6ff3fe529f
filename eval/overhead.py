"""Measure what ScaLoRA costs over LoRA: step time, memory, checkpoint size, and where a rescaling spends its time.

All methods train the same randomly initialised model on the same batch in one process. Every measurement of a method
lies between two steps of LoRA, over whose mean its ratio is taken, so that what the machine does besides hits both.
Ratios are summarised by median and quartiles.

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

import peft_scalora
import peft_scalora.rescaling.engine as engine
from eval.harness.timing import quartiles, spread, timed, with_interval
from eval.overhead_bill import bill_of
from eval.overhead_runs import SHAPES, Method, Run, make_base, make_run, methods
from peft_scalora import ScaLoRAConfig
from peft_scalora.files.atomic import replace_file
from peft_scalora.files.checks import accumulator_rank
from peft_scalora.files.tables import markdown
from peft_scalora.plots import require_matplotlib, save_png

INTERVALS = (1, 10)


def measure(base, methods: dict[str, Method], ids: torch.Tensor, repeats: int, device: str) -> dict:
    """Return the seconds of steps, as a method's and LoRA's beside it, by method; and bills by method."""
    runs = {}
    for name, method in methods.items():
        gc.collect()
        runs[name] = make_run(base, method, ids)
    lora = runs["lora"]
    seconds = {name: [] for name in runs if name != "lora"}
    for repeat in range(repeats):
        before = timed(device, lambda: lora.step(ids))
        for name in seconds:
            # A recompression takes turns with a plain fold, and so does a merge: two steps make one measurement.
            own = statistics.mean(timed(device, lambda run=runs[name]: run.step(ids)) for _ in range(2))
            after = timed(device, lambda: lora.step(ids))
            seconds[name].append((own, (before + after) / 2))
            before = after
        latest = ", ".join(f"{name} {own:.3f}/{beside:.3f}" for name, [*_, (own, beside)] in seconds.items())
        print(f"repeat {repeat + 1}/{repeats}: {latest}", flush=True)
    bills = {name: bill_of(run, ids).as_dict() for name, run in runs.items()}
    return {"seconds": seconds, "bills": bills, "runs": runs}


def summarize(seconds: dict[str, list[tuple[float, float]]]) -> dict[str, dict[str, float]]:
    """Return step time over LoRA's by method; a rescaling in every step is spread over its interval."""
    rows = {"lora": [1.0]}
    relative = {name: [own / beside for own, beside in pairs] for name, pairs in seconds.items()}
    for name, values in relative.items():
        kind, _, part = name.partition(", ")
        if part == "rescaling":
            without = relative[f"{kind}, no rescaling"]
            rows |= {f"scalora {kind}, I={i}": with_interval(without, values, i) for i in INTERVALS}
        elif part != "no rescaling":
            rows[name] = values
    return {name: spread(values) for name, values in rows.items()}


def bill_name(name: str) -> str:
    """Return the run whose bill belongs to a row of the summary."""
    return f"{name.removeprefix('scalora ').partition(',')[0]}, rescaling" if name.startswith("scalora") else name


PARTS = {"solve": "scaling", "fold": "fold", "accumulate": "recompression and merging", "carry": "transport"}


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
    for name in names:
        row = summary[name]
        low_high = [[row["median"] - row["low"]], [row["high"] - row["median"]]]
        colour = "tab:orange" if name.startswith("scalora") else "tab:gray"
        axis.errorbar(row["median"], name, xerr=low_high, fmt="o", color=colour, capsize=3)
    axis.axvline(1, color="tab:blue", linewidth=1.2)
    axis.set(xlabel="step time over LoRA's, median and quartiles", title=title)
    axis.grid(axis="x", alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    save_png(figure, path)


def table(result: dict) -> str:
    """Return Markdown tables: time, bytes and rank by method, and where the time of a rescaling goes."""
    bills = result["bills"]
    rows = []
    for name, row in result["summary"].items():
        bill = bills[bill_name(name)]
        relative = [f"{bill[part] / bills['lora'][part]:.3f}" for part in ("outside_of_rescalings", "peak")]
        sizes = [f"{bill[part] / 2**20:.1f}" for part in ("accumulators", "host", "factors", "file")]
        rows.append([name, quartiles(row), *relative, *sizes, str(bill["served_rank"] or "not served")])
    header = ["method", "step time over LoRA (quartiles)", "device bytes over LoRA", "with rescalings"]
    header += ["accumulators, MiB", "host, MiB", "all-reduce a step, MiB", "file, MiB", "vLLM's rank"]
    lora = statistics.median(beside for pairs in result["seconds"].values() for _, beside in pairs)
    parts = [
        [kind, *(f"{seconds / lora:.3f}" for seconds in spent.values())]
        for kind, spent in result["rescaling_seconds"].items()
    ]
    names = list(next(iter(result["rescaling_seconds"].values())))
    title = "One rescaling, in steps of LoRA:"
    return f"{markdown(header, rows)}\n\n{title}\n\n{markdown(['accumulator', *names], parts)}"


def parse() -> argparse.Namespace:
    """Return what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--tokens", type=int, default=512, help="tokens a step")
    parser.add_argument("--sequence", type=int, default=256)
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--accumulator-rank", type=int, help="R; 7 r unless given")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the base; bfloat16 on a GPU unless given")
    parser.add_argument("--methods", nargs="+", help="only these beside LoRA and ScaLoRA")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--output", default="runs/overhead")
    return parser.parse_args()


def measure_all(arguments: argparse.Namespace, device: str) -> dict:
    """Return seconds, memory and sizes of every method, with what they were measured on."""
    shape = SHAPES[arguments.shape]
    dtype = getattr(torch, arguments.dtype or ("bfloat16" if device == "cuda" else "float32"))
    base = make_base(shape, arguments.layers, dtype, device, arguments.checkpointing)
    rows = max(1, arguments.tokens // arguments.sequence)
    ids = torch.randint(0, shape[5], (rows, arguments.tokens // rows), device=device)
    chosen = methods(arguments.r, arguments.accumulator_rank)
    if arguments.methods is not None:
        scalora = {name for name, method in chosen.items() if isinstance(method.config, ScaLoRAConfig)}
        chosen = {name: m for name, m in chosen.items() if name in {"lora", *scalora, *arguments.methods}}
    measured = measure(base, chosen, ids, arguments.repeats, device)
    runs = measured.pop("runs")
    return {
        "settings": vars(arguments) | {"device": device, "dtype": str(dtype), "threads": torch.get_num_threads()},
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "summary": summarize(measured["seconds"]),
        "rescaling_seconds": {
            kind: split_rescaling(runs[f"{kind}, rescaling"], ids, 3, device) for kind in ("merged", "factored")
        },
        "floor": floor(base, arguments.r, arguments.accumulator_rank, arguments.tokens, device),
        "base_bytes": sum(p.nbytes for p in base.parameters()),
        **measured,
    }


def main() -> None:
    arguments = parse()
    arguments.accumulator_rank = accumulator_rank(arguments.accumulator_rank or "auto", arguments.r)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    result = measure_all(arguments, device)
    os.makedirs(arguments.output, exist_ok=True)
    replace_file(os.path.join(arguments.output, "overhead.json"), json.dumps(result, indent=1) + "\n")
    replace_file(os.path.join(arguments.output, "overhead.md"), table(result) + "\n")
    sizes = f"{arguments.tokens} tokens, r = {arguments.r}, R = {arguments.accumulator_rank}"
    draw(os.path.join(arguments.output, "overhead.png"), result["summary"], f"{arguments.shape}, {sizes}, {device}")
    print(f"\n{table(result)}\n\nfloor: {json.dumps(result['floor'])}")


if __name__ == "__main__":
    main()
