"""Measure what the rank buys in a long run: LoRA and ScaLoRA adapters on a frozen random language model.

The base model is random and frozen, so the adapters have to learn everything, and their rank is the limit. The data are
bytes of generated English; held-out sentences use the same words. Each run leaves one JSON, and `--report` makes the
table and plot of all of them.

    for lr in 1.25e-3 2.5e-3 5e-3 1e-2; do for m in "lora 4" "scalora 4" "lora 16"; do
        python -m eval.studies.long_run --method ${m% *} --r ${m#* } --learning-rate $lr --output results/long_run
    done; done
    python -m eval.studies.long_run --report --output results/long_run

What a smaller accumulator loses:

    for R in 4 8 16 32 64; do
        python -m eval.studies.long_run --r 4 --accumulator-rank $R --learning-rate 5e-3 \\
            --output results/accumulator_rank
    done
"""

from __future__ import annotations

import argparse
import json
import os
import re
import time
from collections import defaultdict
from collections.abc import Sequence
from statistics import mean

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from eval.harness.corpus import byte_stream, held_out_loss, in_rows, windows
from eval.harness.record import read_all
from peft_scalora import ScaLoRAConfig, effective_rank
from peft_scalora.files.atomic import replace_file
from peft_scalora.files.tables import markdown
from peft_scalora.plots import plot_lines

BATCH, LENGTH, EVERY = 16, 64, 250


def make_model(method: str, r: int, accumulator_rank: int | None, seed: int):
    torch.manual_seed(seed)
    base = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=4,
            vocab_size=128,
            max_position_embeddings=128,
        )
    )
    settings = {"r": r, "lora_alpha": 2 * r, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    if method == "lora":
        return get_peft_model(base, LoraConfig(**settings))
    return get_peft_model(base, ScaLoRAConfig(**settings, accumulator_rank=accumulator_rank))


def name_of(result: dict) -> str:
    """Return the name of a run; runs of one name differ by learning rate and seed only."""
    R = result.get("accumulator_rank")
    return f"{result['method']} r={result['r']}" + (f" R={R}" if R else "")


def run(arguments: argparse.Namespace) -> dict:
    """Train one method, and return its settings with (step, held-out nats a byte, mean effective rank)."""
    data = byte_stream(20000, 0)[:-1]
    rows = in_rows(byte_stream(1500, 7), LENGTH, 300)
    model = make_model(arguments.method, arguments.r, arguments.accumulator_rank, arguments.seed)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=arguments.learning_rate)
    steps = arguments.steps
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1, s / 50) * max(0.0, 1 - s / steps))
    generator = torch.Generator().manual_seed(arguments.seed + 1)
    points = []
    started = time.perf_counter()
    for step in range(1, steps + 1):
        batch = windows(data, LENGTH, BATCH, generator)
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % EVERY == 0 or step == steps:
            points.append((step, held_out_loss(model, rows), mean(effective_rank(model).values())))
            print(f"step {step}: {points[-1][1]:.4f} nats a byte, effective rank {points[-1][2]:.1f}", flush=True)
    names = ("method", "r", "accumulator_rank", "learning_rate", "steps", "seed")
    settings = {name: getattr(arguments, name) for name in names}
    return {**settings, "points": points, "seconds": time.perf_counter() - started, "torch": torch.__version__}


def by_name_and_rate(runs: Sequence[dict]) -> dict[str, dict[float, list]]:
    """Return the points of every seed, by name (in the order of its numbers) and learning rate."""
    found = defaultdict(lambda: defaultdict(list))
    for result in sorted(runs, key=lambda result: [int(n) for n in re.findall(r"\d+", name_of(result))]):
        found[name_of(result)][result["learning_rate"]].append(result["points"])
    return found


def best_rate(by_rate: dict[float, list]) -> tuple[float, list[tuple]]:
    """Return the rate with the lowest last loss, and its points: means over seeds."""
    means = {rate: [tuple(map(mean, zip(*point))) for point in zip(*seeds)] for rate, seeds in by_rate.items()}
    rate = min(means, key=lambda rate: means[rate][-1][1])
    return rate, means[rate]


def table(runs: Sequence[dict]) -> str:
    """Return the Markdown table of every method, r and R at its best learning rate."""
    rows = []
    for name, by_rate in by_name_and_rate(runs).items():
        rate, points = best_rate(by_rate)
        _, loss, rank = points[-1]
        tried = ", ".join(f"{rate:g}" for rate in sorted(by_rate))
        rows.append([name, f"{rate:g} ({tried})", str(len(by_rate[rate])), f"{loss:.3f}", f"{rank:.1f}"])
    return markdown(["", "learning rate (tried)", "seeds", "held-out nats a byte", "effective rank"], rows)


def draw(path: str, runs: Sequence[dict]) -> None:
    """Plot held-out loss and effective rank against the step, of the same runs."""
    curves = {name: list(zip(*best_rate(by_rate)[1])) for name, by_rate in by_name_and_rate(runs).items()}
    losses = {name: (steps, loss) for name, (steps, loss, _) in curves.items()}
    ranks = {name: (steps, rank) for name, (steps, _, rank) in curves.items()}
    panels = [("Held-out loss", "nats a byte", losses), ("Rank of the weight change", "effective rank", ranks)]
    plot_lines(path, panels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=("lora", "scalora"), default="scalora")
    parser.add_argument("--r", type=int, default=4)
    parser.add_argument("--accumulator-rank", type=int, help="R; 8 r unless given")
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="runs/long_run")
    parser.add_argument("--report", action="store_true", help="only tabulate and draw the runs in the output folder")
    arguments = parser.parse_args()
    os.makedirs(arguments.output, exist_ok=True)
    if not arguments.report:
        result = run(arguments)
        name = f"{name_of(result)} {result['learning_rate']:g} seed{result['seed']}.json"
        path = os.path.join(arguments.output, name.replace("=", "").replace(" ", "-"))
        replace_file(path, json.dumps(result, indent=1))
    runs = read_all(arguments.output)
    draw(os.path.join(arguments.output, "long_run.png"), runs)
    replace_file(os.path.join(arguments.output, "long_run.md"), table(runs) + "\n")
    print(table(runs))


if __name__ == "__main__":
    main()
