"""LoRA of rank r, LoRA of rank 2r and ScaLoRA of rank r side by side, with error bars.

Without arguments it pretrains a small language model of characters on generated sentences, and adapts it to sentences
of other words. Every method tries every learning rate with one seed, takes the one that is best on validation rows, and
trains at it with further seeds; the table is of rows that were used for nothing else. Your model and data go in place,
with classes, numbers to predict, text, prompts with completions, or conversations:

    python examples/quickstart.py --model PATH_OR_ID --data train.jsonl --test-data test.jsonl
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import torch
from peft import load_peft_weights, set_peft_model_state_dict
from small_model import small_model, write_texts

from peft_scalora.files.atomic import replace_file
from peft_scalora.files.tables import markdown
from peft_scalora.finetuning.run import FinetuneSettings, finetune, make_trainer
from peft_scalora.finetuning.settings import TASKS
from peft_scalora.finetuning.sources import load_rows
from peft_scalora.plots import finish_panel, panels, save_png

RESULTS = {
    "test_loss": "held-out loss",
    "test_accuracy": "held-out accuracy",
    "test_matthews": "held-out Matthews correlation",
    "test_pearson": "held-out Pearson correlation",
}
RATES = (1e-2, 1.78e-2, 3.16e-2)  # of the small model
OWN_RATES = (3e-4, 1e-3, 3e-3)  # of your own


class Contender(NamedTuple):
    """An adapter that takes part."""

    method: str
    r: int

    def __str__(self) -> str:
        return f"{'ScaLoRA' if self.method == 'scalora' else 'LoRA'}, r = {self.r}"


class Run(NamedTuple):
    """A contender with a learning rate and a seed."""

    contender: Contender
    rate: float
    seed: int


class Comparison:
    """Runs of every contender that differ in learning rate and seed only."""

    def __init__(self, arguments: argparse.Namespace, folder: str, model: str, data: Mapping[str, str | None]):
        self.arguments = arguments
        self.folder = folder
        self.model = model
        self.data = data
        self.task = arguments.task or guess_task(data["train"])
        r = arguments.r
        self.contenders = (Contender("lora", r), Contender("lora", 2 * r), Contender("scalora", r))
        self.total = len(self.contenders) * (len(arguments.learning_rates) + arguments.seeds - 1)
        self.finished = 0

    def settings(self, run: Run) -> FinetuneSettings:
        """Return what a run is trained with."""
        (method, r), rate, seed = run
        steps = self.arguments.steps
        return FinetuneSettings(
            model=self.model,
            data=self.data["train"],
            eval_data=self.data["eval"],
            test_data=self.data["test"],
            task=self.task,
            method=method,
            output=os.path.join(self.folder, f"{method}-r{r}-lr{rate:g}-seed{seed}"),
            r=r,
            lora_alpha=2 * r,
            learning_rate=rate,
            lr_scheduler_type="cosine",
            batch_size=self.arguments.batch_size,
            max_steps=steps,
            logging_steps=max(1, steps // 20),
            eval_steps=max(1, steps // 5),
            max_length=128,
            seed=seed,
        )

    def train(self, runs: Sequence[Run]) -> list[dict]:
        """Return the metrics of runs, some at a time; those that are finished are not repeated."""
        found = []
        with processes(min(self.arguments.jobs, len(runs))) as apply:
            for run, metrics in zip(runs, apply(train_quietly, map(self.settings, runs))):
                self.finished += 1
                what = f"{run.contender}, learning rate {run.rate:g}, seed {run.seed}"
                print(f"run {self.finished} of {self.total}: {what}: loss {metrics['eval_loss']:.3f}", flush=True)
                found.append(metrics)
        return found

    def compare(self) -> dict[Contender, list[dict]]:
        """Return the metrics of every seed at the learning rate that is best on the validation rows of the first."""
        grid = [Run(contender, rate, 0) for contender in self.contenders for rate in self.arguments.learning_rates]
        tried = list(zip(grid, self.train(grid)))
        found = {}
        others = []
        for contender in self.contenders:
            own = [(run, metrics) for run, metrics in tried if run.contender == contender]
            best, metrics = min(own, key=lambda each: each[1]["eval_loss"])
            found[contender] = [metrics]
            others += [best._replace(seed=seed) for seed in range(1, self.arguments.seeds)]
        for run, metrics in zip(others, self.train(others)):
            found[run.contender].append(metrics)
        return found


@contextlib.contextmanager
def processes(count: int) -> Iterator[Callable]:
    """Give a `map` that spreads its work over processes of one thread; the plain one for a single process."""
    if count < 2:
        yield map
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, spawn, torch.set_num_threads, (1,)) as pool:
        yield pool.map


def train_quietly(settings: FinetuneSettings) -> dict:
    """Train a run and return its metrics; what it prints goes into a file beside its folder."""
    os.makedirs(os.path.dirname(settings.output), exist_ok=True)
    with (
        open(f"{settings.output}.log", "a", encoding="utf-8") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        return finetune(settings)


def time_steps(found: Mapping[Contender, Sequence[dict]], blocks: int = 4, steps: int = 10) -> dict[Contender, float]:
    """Return median seconds a training step of each trained adapter.

    They train in alternating blocks that hold one rescaling each, on the first batch of their own rows.
    """
    seconds = {contender: [] for contender in found}
    trained = {}
    for contender, (metrics, *_) in found.items():
        trainer = make_trainer(FinetuneSettings(**metrics["settings"]))
        model = trainer.model.train()
        set_peft_model_state_dict(model, load_peft_weights(metrics["settings"]["output"], device="cpu"))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
        batch = next(iter(trainer.get_train_dataloader())).to(model.device)
        trained[contender] = (model, optimizer, batch)
    for _ in range(blocks):
        for contender, (model, optimizer, batch) in trained.items():
            started = time.perf_counter()
            for _ in range(steps):
                model(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            seconds[contender].append((time.perf_counter() - started) / steps)
    return {contender: statistics.median(values) for contender, values in seconds.items()}


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error, 0 of a single seed."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return statistics.fmean(values), error


def with_error(values: Sequence[float], form: str = ".3f") -> str:
    """Return "mean ± standard error", or the value of a single seed."""
    mean, error = mean_and_error(values)
    return f"{mean:{form}}" if len(values) == 1 else f"{mean:{form}} ± {error:.3f}"


def format_table(found: Mapping[Contender, Sequence[dict]], seconds: Mapping[Contender, float]) -> str:
    """Return one Markdown table; which results it has is up to the task."""
    baseline, *_ = found
    rows = [["learning rate", *(f"{runs[0]['settings']['learning_rate']:g}" for runs in found.values())]]
    for name, title in RESULTS.items():
        if name not in found[baseline][0]:
            continue
        values = {contender: [run[name] for run in runs] for contender, runs in found.items()}
        rows.append([title, *map(with_error, values.values())])
        less = [[a - b for a, b in zip(each, values[baseline])] for each in values.values()]
        rows.append([f"less {baseline}", "", *(with_error(each, "+.3f") for each in less[1:])])
    first = {contender: runs[0] for contender, runs in found.items()}
    rows += [
        ["trained numbers", *(f"{run['trainable_parameters']:,}" for run in first.values())],
        ["rank of the weight change (mean of layers)", *(f"{run['effective_rank']:.1f}" for run in first.values())],
        ["checkpoint, KiB", *(f"{run['checkpoint_bytes'] / 1024:,.0f}" for run in first.values())],
        ["time of a step over the first's", *(f"{seconds[key] / seconds[baseline]:.2f}" for key in found)],
    ]
    return markdown(["", *map(str, found)], rows)


def plot(found: Mapping[Contender, Sequence[dict]], path: str) -> None:
    """Plot the validation loss of every contender, its mean with standard error, and the rank of its weight change."""
    figure, axes = panels(2)
    for contender, runs in found.items():
        for axis, name in zip(axes[0], ("eval_loss", "scalora/effective_rank")):
            curves = [{entry["step"]: entry[name] for entry in run["log"] if name in entry} for run in runs]
            steps = sorted(curves[0])
            means, errors = zip(*(mean_and_error([curve[step] for curve in curves]) for step in steps))
            axis.errorbar(
                steps, means, errors, label=str(contender), linewidth=1.6, marker="o", markersize=3, capsize=3
            )
    finish_panel(axes[0][0], "Validation loss, mean ± standard error of seeds", "optimizer step", "loss")
    finish_panel(axes[0][1], "Rank of the weight change", "optimizer step", "effective rank")
    save_png(figure, path)


def guess_task(data: str) -> str:
    """Return the task that rows are for: classification where they have a label, else language modelling."""
    return "classification" if "label" in load_rows(data).column_names else "causal-lm"


def folder_of(arguments: argparse.Namespace) -> str:
    """Return a folder for runs of these settings, apart from those of others."""
    free = ("output", "learning_rates", "seeds", "jobs")
    deciding = {name: value for name, value in vars(arguments).items() if name not in free}
    digest = hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()[:8]
    return os.path.join(arguments.output, f"r{arguments.r}-steps{arguments.steps}-{digest}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="local folder or hub id; a small one that is pretrained now unless given")
    parser.add_argument("--data", help="training rows; generated text unless given")
    parser.add_argument("--eval-data", help="rows to pick the learning rate on; held out of --data unless given")
    parser.add_argument("--test-data", help="rows to report on")
    parser.add_argument("--task", choices=TASKS, help="what is learned; taken from the fields of --data unless given")
    parser.add_argument("--output", default="runs/quickstart")
    parser.add_argument("--r", type=int, default=2)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rates", type=float, nargs="+", help=f"{RATES}, of your own model {OWN_RATES}")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, help="runs at a time; 2 of the small model, 1 of your own, unless given")
    arguments = parser.parse_args()
    given = [bool(value) for value in (arguments.model, arguments.data, arguments.test_data)]
    if len(set(given)) > 1:
        parser.error("--model, --data and --test-data go together")
    arguments.learning_rates = arguments.learning_rates or (OWN_RATES if arguments.data else RATES)
    arguments.jobs = arguments.jobs or (1 if arguments.data else 2)
    return arguments


def main() -> None:
    arguments = parse()
    started = time.perf_counter()
    folder = folder_of(arguments)
    if arguments.data:
        data = {"train": arguments.data, "eval": arguments.eval_data, "test": arguments.test_data}
    else:
        data = write_texts(os.path.join(folder, "texts"), arguments.steps * arguments.batch_size)
    comparison = Comparison(arguments, folder, arguments.model or small_model(".cache"), data)
    print(f"{comparison.total} runs of {arguments.steps} steps; each has a folder and a log in {folder}", flush=True)
    found = comparison.compare()
    seconds = time_steps(found)
    plot(found, os.path.join(folder, "quickstart.png"))
    table = format_table(found, seconds)
    replace_file(os.path.join(folder, "table.md"), table + "\n")
    print(f"\n{table}\n\n{time.perf_counter() - started:.0f} s; table, plots and adapters are in {folder}")


if __name__ == "__main__":
    main()
