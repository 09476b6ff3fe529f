"""Full Gauss-Newton in small (arXiv 2510.09378): steps, tokens and seconds to a target loss at one large batch.

    python -m eval.studies.gauss_newton study       # a Llama-type model from scratch; about an hour on one core
    python -m eval.studies.gauss_newton study --methods gn muon --batch-sizes 16 48      # the same at smaller batches
    python -m eval.studies.gauss_newton report      # tables and plots of what is in the output folder

Bytes of generated English unless --data names a text file. Every method sees batches of the same size: one step of
AdamW, Muon and SOAP averages over as many sequences as the inner loop of one outer Gauss-Newton step sees one
micro-batch after the other. Each method gets a grid of learning rates on seed 0; the best one is repeated on the other
seeds. One JSON a run; runs that are there already are not repeated.
"""

from __future__ import annotations

import argparse
import glob
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from peft_scalora import GaussNewton, GaussNewtonConfig
from peft_scalora.files.atomic import replace_file, replacing
from peft_scalora.finetuning.corpus import generate
from peft_scalora.gauss_newton import matrix_names
from peft_scalora.plots import require_matplotlib

GAUSS_NEWTON = {
    "gn": {"variant": "gn"},
    "gn-prox-linear": {"variant": "prox_linear"},
    "gn-layerwise": {"variant": "gn", "layerwise": True},
}
BASELINES = ("muon", "soap", "adamw")
METHODS = ("gn", "gn-prox-linear", *BASELINES, "gn-layerwise")
LINE_SEARCH = 4  # micro-batches that choose the step size, at once
RATES = {
    "adamw": (3e-3, 1e-2, 3e-2),
    "muon": (2e-2, 3e-2, 6e-2, 1e-1),
    "soap": (5e-3, 1e-2, 2e-2),
    **dict.fromkeys(GAUSS_NEWTON, (3e-3, 5e-3, 8e-3, 1.2e-2)),
}


@dataclass(frozen=True)
class Setting:
    """One run of the study."""

    method: str
    learning_rate: float
    seed: int = 0
    inner_steps: int = 128  # N; a large batch is N micro-batches
    micro_batch: int = 8  # sequences
    length: int = 64  # bytes a sequence
    hidden: int = 64
    layers: int = 2
    target: float = 0.9  # held-out nats a byte
    max_steps: int = 60

    def name(self) -> str:
        return f"{self.method}-n{self.inner_steps}-{self.learning_rate:g}-seed{self.seed}"


def byte_stream(path: str | None, size: int, seed: int) -> torch.Tensor:
    """The acceptable ones of `size` generated sentences, or a file, as one stream of bytes."""
    if path:
        with open(path, "rb") as file:
            return torch.frombuffer(bytearray(file.read()), dtype=torch.uint8).long()
    text = " ".join(row["sentence"] for row in generate("train", size, seed) if row["label"])
    return torch.tensor(list(text.encode()))


class Corpus:
    """Random windows to train on and fixed ones that are held out."""

    def __init__(self, path: str | None, setting: Setting):
        train, held_out = byte_stream(path, 60000, 0), byte_stream(path, 2000, 7)
        if path:
            train, held_out = train[: len(train) * 9 // 10], train[len(train) * 9 // 10 :]
        self.train, self.length = train, setting.length
        self.held_out = held_out[: setting.length * 256].view(-1, setting.length)
        self.vocabulary = 256 if path else 128
        self.generator = torch.Generator().manual_seed(setting.seed + 1)

    def batch(self, rows: int) -> torch.Tensor:
        starts = torch.randint(0, len(self.train) - self.length, (rows,), generator=self.generator)
        return self.train[starts[:, None] + torch.arange(self.length)]


def next_byte_loss(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def make_model(setting: Setting, vocabulary: int) -> LlamaForCausalLM:
    torch.manual_seed(setting.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=setting.hidden,
            intermediate_size=setting.hidden * 8 // 3 // 8 * 8,
            num_hidden_layers=setting.layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            vocab_size=vocabulary,
            max_position_embeddings=setting.length,
            initializer_range=setting.hidden**-0.5,  # transformers' 0.02 is for widths in the thousands
            attn_implementation="eager",
        )
    )


def baseline_optimizers(model: nn.Module, method: str, lr: float) -> list[torch.optim.Optimizer]:
    """No weight decay and the same betas everywhere; Muon is for matrices, AdamW for the rest, as inside GN."""
    betas = (0.9, 0.95)
    if method == "soap":
        try:
            from pytorch_optimizer import SOAP
        except ImportError as error:
            raise ImportError("SOAP needs pytorch-optimizer: pip install '.[benchmark]'.") from error
        return [SOAP(model.parameters(), lr=lr, betas=(0.95, 0.95), weight_decay=0.0, precondition_frequency=1)]
    names = matrix_names(model) if method == "muon" else set()
    matrices = [p for n, p in model.named_parameters() if n in names]
    others = [p for n, p in model.named_parameters() if n not in names]
    adamw = torch.optim.AdamW(others, lr=lr, betas=betas, weight_decay=0.0)
    return [adamw, torch.optim.Muon(matrices, lr=lr, weight_decay=0.0)] if matrices else [adamw]


def baseline_step(model: nn.Module, setting: Setting) -> Callable[[Corpus], None]:
    optimizers = baseline_optimizers(model, setting.method, setting.learning_rate)
    rows = setting.inner_steps * setting.micro_batch
    part = min(rows, 64)  # sequences in memory at a time

    def step(corpus: Corpus) -> None:
        for _ in range(rows // part):
            ids = corpus.batch(part)
            (next_byte_loss(model(input_ids=ids).logits, ids) * part / rows).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    return step


def gauss_newton_step(model: nn.Module, setting: Setting) -> Callable[[Corpus], None]:
    """One outer step: the inner loop and the line search."""
    config = GaussNewtonConfig(inner_steps=setting.inner_steps, line_search_points=10, **GAUSS_NEWTON[setting.method])
    optimizer = GaussNewton(model.named_parameters(), config, lr=setting.learning_rate, muon=matrix_names(model))

    def step(corpus: Corpus) -> None:
        done = optimizer.progress["outer_steps"]
        while optimizer.progress["outer_steps"] == done:
            ids = corpus.batch(setting.micro_batch * (LINE_SEARCH if optimizer.in_line_search else 1))

            def forward(params, ids=ids):
                return functional_call(model, params, kwargs={"input_ids": ids}).logits

            optimizer.loss(forward, lambda logits, ids=ids: next_byte_loss(logits, ids)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    step.optimizer = optimizer
    return step


@torch.no_grad()
def held_out_loss(model: nn.Module, rows: torch.Tensor) -> float:
    return next_byte_loss(model(input_ids=rows).logits, rows).item()


def run(setting: Setting, data: str | None) -> dict:
    """Train until the target or `max_steps`: held-out loss, tokens and CPU seconds (without evaluation) by step."""
    corpus = Corpus(data, setting)
    model = make_model(setting, corpus.vocabulary)
    step = (gauss_newton_step if setting.method in GAUSS_NEWTON else baseline_step)(model, setting)
    points, seconds = [], 0.0
    micro_batches = setting.inner_steps + (LINE_SEARCH if setting.method in GAUSS_NEWTON else 0)
    tokens = micro_batches * setting.micro_batch * setting.length
    bar = tqdm(range(1, setting.max_steps + 1), desc=setting.name())
    for number in bar:
        started = time.process_time()  # other processes' share of the machine does not count
        step(corpus)
        seconds += time.process_time() - started
        loss = held_out_loss(model, corpus.held_out)
        points.append({"step": number, "loss": loss, "tokens": number * tokens, "seconds": seconds})
        if hasattr(step, "optimizer"):
            points[-1]["step_size"] = step.optimizer.progress["step_size"]
        bar.set_postfix(loss=f"{loss:.3f}")
        if not loss < 50 or loss <= setting.target:
            break
    bar.close()
    return {"setting": asdict(setting), "data": data, "points": points, "torch": torch.__version__}


def cached_run(setting: Setting, arguments: argparse.Namespace) -> dict:
    folder = os.path.join(arguments.output, "study")
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, f"{setting.name()}.json")
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    result = run(setting, arguments.data)
    replace_file(path, json.dumps(result, indent=1))
    return result


def steps_to_target(result: dict) -> float:
    """The first step at or below the target, infinity if there is none."""
    target = result["setting"]["target"]
    return next((point["step"] for point in result["points"] if point["loss"] <= target), float("inf"))


def merit(result: dict) -> tuple[float, float]:
    return steps_to_target(result), result["points"][-1]["loss"]


def study(arguments: argparse.Namespace) -> None:
    """The grid on the first seed, the best rate on the others, then the grid at other batch sizes."""
    base = Setting("", 0.0, target=arguments.target, max_steps=arguments.max_steps)
    for method in arguments.methods:
        limit = arguments.max_steps if method in BASELINES else arguments.max_steps // 3
        setting = replace(base, method=method, max_steps=limit)
        rates = arguments.learning_rates or RATES[method]
        grid = [cached_run(replace(setting, learning_rate=rate), arguments) for rate in rates]
        best = min(grid, key=merit)["setting"]["learning_rate"]
        if min(map(steps_to_target, grid)) == float("inf"):
            continue  # no seed will tell more
        for seed in arguments.seeds:
            cached_run(replace(setting, learning_rate=best, seed=seed), arguments)
        for inner_steps in arguments.batch_sizes:
            if method in ("muon", "gn"):
                more = replace(setting, inner_steps=inner_steps, max_steps=4 * arguments.max_steps)
                for rate in rates:  # every batch size needs its own
                    cached_run(replace(more, learning_rate=rate), arguments)


def load_runs(folder: str) -> list[dict]:
    runs = []
    for path in sorted(glob.glob(os.path.join(folder, "study", "*.json"))):
        with open(path, encoding="utf-8") as file:
            runs.append(json.load(file))
    return runs


def best_runs(runs: list[dict], method: str, inner_steps: int) -> list[dict]:
    """One run a seed, at the rate that is best on seed 0."""
    runs = [r for r in runs if (r["setting"]["method"], r["setting"]["inner_steps"]) == (method, inner_steps)]
    grid = [r for r in runs if r["setting"]["seed"] == 0]
    if not grid:
        return []
    rate = min(grid, key=merit)["setting"]["learning_rate"]
    return sorted((r for r in runs if r["setting"]["learning_rate"] == rate), key=lambda r: r["setting"]["seed"])


def spread(values: list[float], form: str) -> str:
    """Median and range."""
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:{form}}" if low == high else f"{middle:{form}} ({low:{form}} to {high:{form}})"


def table(runs: list[dict], inner_steps: int) -> str:
    """Markdown: steps, tokens and CPU seconds to the target, median and range over seeds."""
    lines = ["| | learning rate (tried) | seeds | steps | million tokens | CPU seconds |", "|---|---|---|---|---|---|"]
    for method in METHODS:
        best = best_runs(runs, method, inner_steps)
        if not best:
            continue
        same = [r["setting"] for r in runs if r["setting"]["method"] == method]
        tried = sorted({s["learning_rate"] for s in same if s["inner_steps"] == inner_steps and s["seed"] == 0})
        rates = f"{best[0]['setting']['learning_rate']:g} ({', '.join(f'{rate:g}' for rate in tried)})"
        ends = [r["points"][-1] for r in best]
        if min(map(steps_to_target, best)) == float("inf"):
            cells = f"more than {ends[0]['step']} (loss {ends[0]['loss']:.2f}) | | "
        else:
            steps = spread([steps_to_target(r) for r in best], ".0f").replace(
                "inf", f"more than {max(e['step'] for e in ends)}"
            )
            tokens = spread([end["tokens"] / 1e6 for end in ends], ".2f")
            seconds = spread([end["seconds"] for end in ends], ".0f")
            cells = f"{steps} | {tokens} | {seconds}"
        lines.append(f"| {method} | {rates} | {len(best)} | {cells} |")
    return "\n".join(lines)


def draw(path: str, runs: list[dict], inner_steps: int, target: float) -> None:
    """Held-out loss against steps, tokens and CPU seconds; the best rate of each method, all seeds."""
    pyplot = require_matplotlib()
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4), sharey=True)
    axes_of = (
        ("step", 1, "steps of one large batch"),
        ("tokens", 1e-6, "million tokens"),
        ("seconds", 1, "CPU seconds"),
    )
    for index, method in enumerate(METHODS):
        for result in best_runs(runs, method, inner_steps):
            style = {"color": f"C{index}", "linewidth": 1.5, "alpha": 0.8}
            label = method if result["setting"]["seed"] == 0 else None
            for axis, (name, factor, _) in zip(axes, axes_of):
                axis.plot(
                    [p[name] * factor for p in result["points"]],
                    [p["loss"] for p in result["points"]],
                    **style,
                    label=label,
                )
    for axis, (_, _, xlabel) in zip(axes, axes_of):
        axis.axhline(target, color="black", linewidth=0.8, linestyle=":")
        axis.set(xlabel=xlabel, xscale="log", ylim=(target - 0.15, 5))
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set(ylabel="held-out nats a byte")
    figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, loc="lower center", ncol=len(METHODS))
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)
    pyplot.close(figure)


def report(arguments: argparse.Namespace) -> None:
    """Tables and plots of all runs in the output folder, for each batch size."""
    runs = load_runs(arguments.output)
    texts = []
    for inner_steps in sorted({r["setting"]["inner_steps"] for r in runs}, reverse=True):
        sequences = inner_steps * Setting("", 0.0).micro_batch
        texts.append(f"Batches of {sequences} sequences (N = {inner_steps}):\n\n{table(runs, inner_steps)}\n")
    replace_file(os.path.join(arguments.output, "study.md"), "\n".join(texts))
    first = Setting("", 0.0)
    draw(os.path.join(arguments.output, "study.png"), runs, first.inner_steps, runs[0]["setting"]["target"])
    print("\n".join(texts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("study", "report"))
    parser.add_argument("--output", default="results/gauss_newton")
    parser.add_argument("--data", help="a text file; generated sentences unless given")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--learning-rates", type=float, nargs="+", help="instead of each method's own grid")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--target", type=float, default=0.9)
    parser.add_argument("--max-steps", type=int, default=60)
    parser.add_argument("--batch-sizes", type=int, nargs="*", default=[])
    arguments = parser.parse_args()
    {"study": study, "report": report}[arguments.command](arguments)


if __name__ == "__main__":
    main()
