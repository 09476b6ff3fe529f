"""Measure how ScaLoRA's cost grows with r, R, tokens, layers and hidden size, one at a time, and with the interval I.

For every point a Llama of random weights is trained with LoRA and with ScaLoRA (full accumulators), interleaved in one
process: the time of a rescaling, the mean of a fold and a recompression, and the step time over LoRA's.

    python -m eval.studies.overhead_sweep --output results/overhead
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics

import torch
from tqdm import tqdm

import peft_scalora
from eval.harness.timing import timed, with_interval
from eval.overhead_runs import make_base, make_run, methods
from peft_scalora.files.atomic import replace_file
from peft_scalora.files.tables import markdown
from peft_scalora.plots import require_matplotlib, save_png

BASE = {"hidden": 512, "layers": 2, "tokens": 256, "r": 8, "R": 64}
SWEEPS = {
    "hidden": (256, 512, 1024, 2048),
    "layers": (1, 2, 4, 8),
    "tokens": (64, 256, 1024),
    "r": (2, 4, 8, 16),
    "R": (16, 32, 64, 128),
}
LABELS = {
    "hidden": "hidden size",
    "layers": "layers",
    "tokens": "tokens a step",
    "r": "r (at R = 64)",
    "R": "R (at r = 8)",
}
INTERVALS = (1, 2, 5, 10, 20, 50)


def measure_point(point: dict[str, int], repeats: int, device: str) -> dict:
    """Return seconds of a LoRA step, a ScaLoRA step without rescaling, and a rescaling, `repeats` of each."""
    hidden = point["hidden"]
    shape = (hidden, 8 * hidden // 3, point["layers"], hidden // 64, hidden // 64, 1024)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    base = make_base(shape, None, dtype, device, checkpointing=False)
    ids = torch.randint(0, 1024, (1, point["tokens"]), device=device)
    known = methods(point["r"], point["R"])
    lora, scalora = (make_run(base, known[name], ids) for name in ("lora", "factored, no rescaling"))
    seconds = {"lora": [], "scalora": [], "rescaling": []}
    for _ in range(repeats):
        seconds["lora"].append(timed(device, lambda: lora.step(ids)))
        seconds["scalora"].append(timed(device, lambda: scalora.step(ids)))
        scalora.model(input_ids=ids, labels=ids).loss.backward()
        pair = [timed(device, lambda: peft_scalora.rescale(scalora.model, scalora.optimizer)) for _ in range(4)]
        seconds["rescaling"].append(statistics.mean(pair))
        scalora.optimizer.zero_grad()
    return {"point": point, "seconds": seconds}


def ratio(result: dict, interval: float = math.inf) -> float:
    """Return the median step time over LoRA's at one interval."""
    seconds = result["seconds"]
    rescaling = [a + b for a, b in zip(seconds["scalora"], seconds["rescaling"])]
    steps = with_interval(seconds["scalora"], rescaling, interval)
    return statistics.median(a / b for a, b in zip(steps, seconds["lora"]))


def growth(results: list[dict], name: str) -> float:
    """Return the power of `name` with which the rescaling time grows, between the two largest values."""
    small, large = results[-2:]
    times = (statistics.median(r["seconds"]["rescaling"]) for r in (small, large))
    first, last = (math.log(t) for t in times)
    return (last - first) / math.log(large["point"][name] / small["point"][name])


def draw(path: str, sweeps: dict[str, list[dict]]) -> None:
    """Plot milliseconds of a rescaling above, and step time over LoRA's below: none, every 10 and every step."""
    size = (3.1 * len(sweeps), 5.6)
    figure, axes = require_matplotlib().subplots(2, len(sweeps), figsize=size, sharex="col", sharey="row")
    for (name, results), (top, bottom) in zip(sweeps.items(), axes.T):
        values = [r["point"][name] for r in results]
        times = [1000 * statistics.median(r["seconds"]["rescaling"]) for r in results]
        top.loglog(values, times, marker="o", color="tab:orange")
        top.set_title(f"{LABELS[name]}: power {growth(results, name):.2f}", fontsize=10)
        for label, interval in (("no rescaling", math.inf), ("I = 10", 10), ("I = 1", 1)):
            bottom.semilogx(values, [ratio(r, interval) for r in results], marker="o", label=label)
        bottom.axhline(1, color="black", linewidth=0.8)
        bottom.set(xlabel=LABELS[name])
        bottom.set_xticks(values, [str(v) for v in values])
        bottom.minorticks_off()
        for axis in (top, bottom):
            axis.grid(alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("one rescaling, ms")
    axes[0, 0].yaxis.set_major_formatter("{x:g}")
    axes[0, 0].yaxis.set_minor_formatter("{x:g}")
    axes[1, 0].set_ylabel("step time over LoRA")
    axes[1, 0].legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.3), fontsize=8)
    save_png(figure, path)


def table(sweeps: dict[str, list[dict]]) -> str:
    """Return a Markdown table of how times grow with each quantity, and the times at other intervals."""
    rows = []
    for name, results in sweeps.items():
        times = [statistics.median(r["seconds"]["rescaling"]) for r in results]
        cells = [
            LABELS[name],
            ", ".join(str(r["point"][name]) for r in results),
            ", ".join(f"{t / times[0]:.2f}" for t in times),
            f"{growth(results, name):.2f}",
            ", ".join(f"{ratio(r, 10):.2f}" for r in results),
        ]
        rows.append(cells)
    whole = next(r for r in sweeps["hidden"] if r["point"] == BASE)
    ratios = ", ".join(f"{ratio(whole, i):.2f}" for i in INTERVALS)
    intervals = ", ".join(map(str, INTERVALS))
    header = ["varied", "values", "one rescaling, relative", "power", "step time over LoRA at I = 10"]
    return f"{markdown(header, rows)}\n\nStep time over LoRA at I = {intervals} ({json.dumps(BASE)}): {ratios}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", default="runs/overhead")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sweeps = {
        name: [measure_point({**BASE, name: value}, arguments.repeats, device) for value in tqdm(values, desc=name)]
        for name, values in SWEEPS.items()
    }
    settings = {"device": device, "threads": torch.get_num_threads(), "torch": torch.__version__}
    os.makedirs(arguments.output, exist_ok=True)
    replace_file(os.path.join(arguments.output, "sweep.json"), json.dumps({**settings, "sweeps": sweeps}, indent=1))
    draw(os.path.join(arguments.output, "sweep.png"), sweeps)
    replace_file(os.path.join(arguments.output, "sweep.md"), table(sweeps) + "\n")
    print(table(sweeps))


if __name__ == "__main__":
    main()
