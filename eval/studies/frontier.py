"""When does ScaLoRA beat LoRA, by how much, and by which column rule?

    python -m eval.studies.frontier run --data-dir D --methods LoRA "ScaLoRA column" "ScaLoRA shrink" --r 4
    python -m eval.studies.frontier run --data-dir D --suite recall --steps 600 --r 4
    python -m eval.studies.frontier report

A small language model of bytes is pretrained on one text (GSM8K of the data folder, or generated sentences). Adapters
of its linear layers then learn another text (MATH, or sentences of other words), or pairs of a name and a number by
heart. Of every method, rank and length the learning rate is searched on a grid of ratio 10^(1/4), with one seed, until
the best has a worse neighbour on both sides. Other seeds then tell its loss. One line a run; finished runs stay.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch

from peft_scalora.files.atomic import replace_file

from .frontier_alone import train_alone
from .frontier_pictures import draw, draw_step_time, step_times
from .frontier_population import Population, train_runs
from .frontier_report import report
from .frontier_runs import METHODS, SEARCH_SEED, Run, append_runs, read_runs
from .frontier_tasks import BaseModel, RecallTask, TextTask, base_model, held_out_rows, load_texts

# Runs that are trained at once.
POPULATION = 16
RESULTS = "results/frontier"
TITLE = """# When ScaLoRA pays

Commands and protocol: [docs/evaluation.md](../../docs/evaluation.md#when-scalora-pays).
"""


class Study:
    """The runs of one suite in a results file, and how to make those that it lacks."""

    def __init__(self, path: str, suite: str, data_dir: str | None, cache: str, sizes: BaseModel):
        texts = load_texts(data_dir)
        self.path = path
        self.suite = suite
        self.base = base_model(sizes, texts, cache)
        self.task = TextTask(texts) if suite == "text" else RecallTask()
        self.base_rows = held_out_rows(texts.base_held_out)

    def record_untrained(self) -> None:
        """Write the lines of what needs no training: the base model as it is, and counts."""
        done = read_runs(self.path)
        population = Population(self.base, [Run(self.suite, "full", 0, 0, 0, 0)])
        found = {"untrained": population.scores(self.task, self.base_rows)[0]}
        found |= {name: {"loss": loss} for name, loss in self.task.counted().items()}
        lines = {Run(self.suite, name, 0, 0, 0, 0): result for name, result in found.items()}
        missing = [run for run in lines if run not in done]
        append_runs(self.path, missing, [lines[run] for run in missing])

    def make(self, runs: Iterable[Run]) -> dict[Run, dict]:
        """Train the runs that are not finished, alike ones together; return all that are finished then."""
        done = read_runs(self.path)
        alike = defaultdict(list)
        for run in dict.fromkeys(runs):
            if run not in done:
                alike[run.r, run.steps, METHODS[run.method].kind].append(run)
        for missing in alike.values():
            at_once = POPULATION if METHODS[missing[0].method].is_shared else 1
            for start in range(0, len(missing), at_once):
                self._train(missing[start : start + at_once])
        return read_runs(self.path)

    def _train(self, runs: Sequence[Run]) -> None:
        started = time.perf_counter()
        if METHODS[runs[0].method].is_shared:
            results = train_runs(self.base, runs, self.task, self.base_rows)
        else:
            results = [train_alone(self.base, run, self.task, self.base_rows) for run in runs]
        append_runs(self.path, runs, results)
        for run, result in zip(runs, results):
            print(run, result)
        seconds = time.perf_counter() - started
        print(f"{seconds:.0f} s, {1000 * seconds / max(1, len(runs) * runs[0].steps):.1f} ms a run's step", flush=True)

    def best_rates(self, pairs: Sequence[tuple[str, int]], steps: int, rates: dict) -> dict:
        """Return the best rate of every (method, r), each of which has worse neighbours on both sides."""
        rates = dict(rates)
        while True:
            around = {(pair, rates[pair] + offset) for pair in pairs for offset in (-1, 0, 1)}
            runs = {(pair, rate): Run(self.suite, *pair, steps, rate, SEARCH_SEED) for pair, rate in sorted(around)}
            done = self.make(runs.values())
            losses = {key: done[run]["loss"] for key, run in runs.items()}
            better = {pair: self._best(pair, rates[pair], losses) for pair in pairs}
            if better == rates:
                return rates
            rates = better

    @staticmethod
    def _best(pair: tuple[str, int], rate: int, losses: dict) -> int:
        tried = {rate + offset: losses[pair, rate + offset] for offset in (0, -1, 1)}
        return min(tried, key=lambda rate: math.inf if tried[rate] is None else tried[rate])

    def search(self, pairs: Sequence[tuple[str, int]], lengths: Iterable[int], seeds: int) -> None:
        """Find the best rates at every length, the shortest first, and run other seeds there."""
        rates = {pair: METHODS[pair[0]].first_rate for pair in pairs}
        for steps in sorted(lengths):
            rates = self.best_rates(pairs, steps, rates)
            told = itertools.product(range(SEARCH_SEED + 1, SEARCH_SEED + 1 + seeds), pairs)
            self.make(Run(self.suite, *pair, steps, rates[pair], seed) for seed, pair in told)


def write_report(folder: str) -> None:
    """Write the tables, and a picture of every suite, beside the runs in a folder."""
    runs = read_runs(os.path.join(folder, "runs.jsonl"))
    suites = sorted({run.suite for run in runs if run.steps}, reverse=True)
    parts = [f"## {suite}\n\n![{suite}]({suite}.png)\n\n{report(runs, suite)}" for suite in suites]
    replace_file(os.path.join(folder, "frontier.md"), "\n".join([TITLE, *parts]))
    for suite in suites:
        draw(runs, suite, os.path.join(folder, f"{suite}.png"))
    times = step_times()
    if times:
        draw_step_time(runs, "text", 4, times, os.path.join(folder, "step_time.png"))
    print("\n".join(parts))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "report"))
    parser.add_argument("--suite", choices=("text", "recall"), default="text")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=["LoRA", "ScaLoRA shrink"])
    parser.add_argument("--r", type=int, nargs="+", default=[4], help="ranks; 0 for the method full")
    parser.add_argument("--steps", type=int, nargs="+", default=[75, 300, 1200])
    parser.add_argument("--seeds", type=int, default=5, help="seeds beside the one of the search")
    parser.add_argument("--data-dir", help="folder with gsm8k/ and math/; generated text unless given")
    parser.add_argument("--output", default=RESULTS, help=f"folder of runs and report (default {RESULTS})")
    parser.add_argument("--cache", default="runs/frontier", help="folder of pretrained base models")
    arguments = parser.parse_args(argv)
    if arguments.command == "report":
        write_report(arguments.output)
        return
    torch.set_num_threads(1)
    path = os.path.join(arguments.output, "runs.jsonl")
    study = Study(path, arguments.suite, arguments.data_dir, arguments.cache, BaseModel())
    study.record_untrained()
    pairs = list(itertools.product(arguments.methods, arguments.r))
    study.search(pairs, arguments.steps, arguments.seeds)


if __name__ == "__main__":
    main()
