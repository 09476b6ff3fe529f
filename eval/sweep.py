"""Tune every method in the same way: one grid of learning rates, one budget, then more seeds at the best rate.

    python -m eval.sweep --module eval.glue --methods full lora lora-4r scalora scalora,scaling_interval=1 \\
        --rates 3e-4 1e-3 3e-3 --seeds 3 --output results/glue/cola -- --model MINILM --task cola --steps 150

All that follows `--` goes to the module. A method is a name with settings of its own after commas. The rate is chosen
by the dev metric of the first seed; while the best is at an end of its grid, the grid grows there by its own ratio, so
no method is judged by an end. Every run leaves one JSON; a sweep that is continued repeats nothing. A run that crashes
stays to be seen in the report.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

from tqdm import tqdm

from eval.harness.record import FAILED, FINISHED, read, to_json
from eval.harness.training import UNTRAINED
from peft_scalora.files.atomic import replace_file
from peft_scalora.files.claim import refuse_other_run

PLAN_NAME = "plan.json"
LOWER_IS_BETTER = ("loss",)  # ends of the names of metrics
LEAST_RATIO = 1.2  # of two rates of a grid; closer ones would be equal in two digits


@dataclass(frozen=True)
class Sweep:
    """A module to run, its arguments, and where its JSONs go."""

    module: str
    arguments: tuple[str, ...]
    rates: tuple[float, ...]
    seeds: int
    output: str
    max_rates: int = 9

    def path(self, method: str, rate: float, seed: int) -> str:
        return os.path.join(self.output, f"{method.replace(',', '-')}-lr{rate:g}-seed{seed}.json")

    def run(self, method: str, rate: float, seed: int) -> dict:
        """Return the result of one run, which is started unless it is there."""
        path = self.path(method, rate, seed)
        if os.path.exists(path):
            found = read(path)
            if found["status"] == FINISHED:
                return found
            os.unlink(path)  # of a failure, so that what is there afterwards is of this attempt
        self._start(method, rate, seed, path)
        return read(path)

    def _start(self, method: str, rate: float, seed: int, path: str) -> None:
        """Run the module; what it prints is in a .log while it runs, and stays there if it fails."""
        name, *others = method.split(",")
        command = [sys.executable, "-m", self.module, *self.arguments, "--method", name]
        for item in others:
            command += option(item)
        command += ["--learning-rate", f"{rate:g}", "--seed", str(seed), "--output", path]
        log = f"{path}.log"
        with open(log, "w", encoding="utf-8") as file:
            code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
        if code == 0:
            os.unlink(log)
        elif not os.path.exists(path):  # it was killed, or failed before it could say so
            settings = {"method": name, "learning_rate": rate, "seed": seed}
            failed = {"status": FAILED, "settings": settings, "error": f"exit status {code}: see {log}"}
            replace_file(path, to_json(failed))


def option(item: str) -> list[str]:
    """Return "scaling_interval=1" as a command line has it; a field set to True or False is a switch."""
    name, _, value = item.partition("=")
    name = name.replace("_", "-")
    return {"True": [f"--{name}"], "False": [f"--no-{name}"]}.get(value, [f"--{name}", value])


def dev_value(result: dict) -> float:
    """Return the dev metric at the end of a run, made so that higher is better; -inf of a run that failed."""
    if result["status"] != FINISHED:
        return float("-inf")
    value = result["curve"][-1][result["dev_metric"]]
    value = -value if result["dev_metric"].endswith(LOWER_IS_BETTER) else value
    return value if value == value else float("-inf")


def best_rate(values: dict[float, float]) -> float:
    """Return the rate of the highest value; of equal ones that nearest to the middle of the grid."""
    rates = sorted(values)
    middle = (len(rates) - 1) / 2
    return max(rates, key=lambda rate: (values[rate], -abs(rates.index(rate) - middle)))


def next_rate(values: dict[float, float]) -> float | None:
    """Return the rate to try beyond an end of the grid that is as good as the best so far, or None.

    Where all rates are equal, as those of a classifier that always says the same, the grid grows at both ends in turn.
    """
    rates, best = sorted(values), max(values.values())
    ends = [rate for rate in (rates[0], rates[-1]) if values[rate] == best != float("-inf")]
    if not ends:
        return None
    end = ends[len(values) % len(ends)]
    return float(f"{end * (rates[0] / rates[1] if end == rates[0] else rates[-1] / rates[-2]):.2g}")


def tune(sweep: Sweep, method: str, progress: tqdm) -> None:
    """Run the grid on the first seed, extended until its best is inside, then the other seeds at the best rate.

    The untrained model is run once.
    """
    if method == UNTRAINED:
        sweep.run(method, sweep.rates[0], 0)
        return
    values: dict[float, float] = {}
    waiting = list(sweep.rates)
    while waiting:
        rate = waiting.pop(0)
        progress.set_postfix_str(f"{method} {rate:g}")
        values[rate] = dev_value(sweep.run(method, rate, 0))
        progress.update()
        if not waiting and len(values) < sweep.max_rates:
            further = next_rate(values)
            waiting = [] if further is None else [further]
    if values[best_rate(values)] == float("-inf"):
        return
    for seed in range(1, sweep.seeds):
        sweep.run(method, best_rate(values), seed)
        progress.update()


def save_plan(sweep: Sweep, methods: list[str]) -> None:
    """Keep what is run beside the results; methods may be added to it later, nothing else may change.

    Raises:
        ValueError: the folder is of another sweep.
    """
    path = os.path.join(sweep.output, PLAN_NAME)
    # Paths by their names: the plan is the same on another machine.
    arguments = [os.path.basename(part.rstrip(os.sep)) if os.sep in part else part for part in sweep.arguments]
    plan = {
        "module": sweep.module,
        "arguments": arguments,
        "rates": list(sweep.rates),
        "seeds": sweep.seeds,
    }
    before = read(path) if os.path.exists(path) else plan | {"methods": []}
    refuse_other_run(f"{path} is of a sweep", before, plan, "choose another --output", may_change={"methods"})
    plan["methods"] = list(dict.fromkeys([*before["methods"], *methods]))
    replace_file(path, json.dumps(plan, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--module", required=True)
    parser.add_argument("--methods", nargs="+", required=True)
    parser.add_argument("--rates", nargs="+", type=float, default=[3e-4, 1e-3, 3e-3])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="methods at a time; their seconds disturb each other")
    parser.add_argument("--output", required=True)
    parser.add_argument("arguments", nargs="*", help="after --: for the module")
    arguments = parser.parse_args()
    rates = sorted(arguments.rates)
    if len(rates) < 2 or any(high < LEAST_RATIO * low for low, high in pairwise(rates)):
        parser.error(f"--rates needs two or more, each {LEAST_RATIO} times the one before: grids grow by it.")
    sweep = Sweep(arguments.module, tuple(arguments.arguments), tuple(rates), arguments.seeds, arguments.output)
    os.makedirs(sweep.output, exist_ok=True)
    save_plan(sweep, arguments.methods)
    total = len(arguments.methods) * (len(sweep.rates) + sweep.seeds - 1)
    with tqdm(total=total, desc="runs") as progress, ThreadPoolExecutor(arguments.jobs) as pool:
        for done in [pool.submit(tune, sweep, method, progress) for method in arguments.methods]:
            done.result()


if __name__ == "__main__":
    main()
