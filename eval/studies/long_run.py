"""What the rank buys in a long run: LoRA and ScaLoRA adapters on a frozen random language model.

The base model is random and frozen, so the adapters have to learn all there is, and their rank is the limit. Bytes of
generated English; held-out sentences of the same words. One JSON a run; `--report` makes the table and plot of all that
are there.

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
import glob
import json
import os
import re
import time
from collections import defaultdict
from statistics import mean

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from peft_scalora import ScaLoRAConfig, effective_rank
from peft_scalora.files.atomic import replace_file
from peft_scalora.finetuning.corpus import generate
from peft_scalora.plots import plot_lines

BATCH, LENGTH, EVERY = 16, 64, 250


def byte_stream(size: int, seed: int) -> torch.Tensor:
    """The acceptable ones of `size` generated sentences, as one stream of bytes."""
    text = " ".join(row["sentence"] for row in generate("train", size, seed) if row["label"])
    return torch.tensor(list(text.encode()))


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
    """Runs of one name differ by learning rate and seed only."""
    R = result.get("accumulator_rank")
    return f"{result['method']} r={result['r']}" + (f" R={R}" if R else "")


def held_out_loss(model, rows: torch.Tensor) -> float:
    model.eval()
    with torch.no_grad():
        loss = model(input_ids=rows, labels=rows).loss.item()
    model.train()
    return loss


def run(arguments: argparse.Namespace) -> dict:
    """Train one method, and return its settings with (step, held-out nats a byte, mean effective rank)."""
    data, held_out = byte_stream(20000, 0), byte_stream(1500, 7)
    rows = held_out[: LENGTH * 300].view(-1, LENGTH)
    model = make_model(arguments.method, arguments.r, arguments.accumulator_rank, arguments.seed)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=arguments.learning_rate)
    steps = arguments.steps
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1, s / 50) * max(0.0, 1 - s / steps))
    generator, points, started = torch.Generator().manual_seed(arguments.seed + 1), [], time.perf_counter()
    for step in range(1, steps + 1):
        starts = torch.randint(0, len(data) - LENGTH - 1, (BATCH,), generator=generator)
        batch = torch.stack([data[start : start + LENGTH] for start in starts])
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % EVERY == 0 or step == steps:
            ranks = effective_rank(model)
            points.append((step, held_out_loss(model, rows), sum(ranks.values()) / len(ranks)))
            print(f"step {step}: {points[-1][1]:.4f} nats a byte, effective rank {points[-1][2]:.1f}", flush=True)
    settings = {
        name: vars(arguments)[name] for name in ("method", "r", "accumulator_rank", "learning_rate", "steps", "seed")
    }
    return {**settings, "points": points, "seconds": time.perf_counter() - started, "torch": torch.__version__}


def report(folder: str) -> str:
    """Markdown table, and curves, of every method, r and R at its best learning rate."""
    runs = []
    for path in sorted(glob.glob(os.path.join(folder, "*.json"))):
        with open(path, encoding="utf-8") as file:
            runs.append(json.load(file))
    by_name = defaultdict(lambda: defaultdict(list))
    for result in runs:
        by_name[name_of(result)][result["learning_rate"]].append(result["points"])
    lines = ["| | learning rate (tried) | seeds | held-out nats a byte | effective rank |", "|---|---|---|---|---|"]
    best = {}
    for name, by_rate in sorted(by_name.items(), key=lambda item: [int(n) for n in re.findall(r"\d+", item[0])]):
        # The mean over seeds of every point; the rate with the lowest last loss.
        means = {rate: [tuple(map(mean, zip(*point))) for point in zip(*seeds)] for rate, seeds in by_rate.items()}
        rate = min(means, key=lambda rate: means[rate][-1][1])
        best[name], (_, loss, rank) = means[rate], means[rate][-1]
        rates = ", ".join(f"{rate:g}" for rate in sorted(by_rate))
        lines.append(f"| {name} | {rate:g} ({rates}) | {len(by_rate[rate])} | {loss:.3f} | {rank:.1f} |")
    curves = {name: list(zip(*points)) for name, points in best.items()}
    losses = {name: (steps, loss) for name, (steps, loss, _) in curves.items()}
    ranks = {name: (steps, rank) for name, (steps, _, rank) in curves.items()}
    panels = [("Held-out loss", "nats a byte", losses), ("Rank of the weight change", "effective rank", ranks)]
    plot_lines(os.path.join(folder, "long_run.png"), panels)
    table = "\n".join(lines)
    replace_file(os.path.join(folder, "long_run.md"), table + "\n")
    return table


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
        name = f"{name_of(result)} {result['learning_rate']:g} seed{result['seed']}.json".replace("=", "").replace(
            " ", "-"
        )
        replace_file(os.path.join(arguments.output, name), json.dumps(result, indent=1))
    print(report(arguments.output))


if __name__ == "__main__":
    main()
