"""Tune every method in the same way: one grid of learning rates, one budget, then more seeds at the best rate.

    python -m eval.sweep --module eval.glue --methods full lora lora-4r scalora scalora,scaling_interval=1 \\
        --rates 3e-4 1e-3 3e-3 --seeds 3 --output results/glue/cola -- --model MINILM --task cola --steps 150

All that follows `--` goes to the module. A method is a name with settings of its own after commas. The rate is chosen
by the dev metric of the first seed; while the best is at an end of its grid, the grid grows there by its own ratio, so
no method is judged by an end. Trials are in `sweep.db` (optuna, sqlite), runs one JSON each; a sweep that is continued
repeats nothing. A run that crashes is a trial that failed, and stays to be seen in the report.
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

import optuna
from tqdm import tqdm

from eval.harness.record import FAILED, FINISHED, read, to_json
from eval.harness.training import UNTRAINED
from peft_scalora.files.atomic import replace_file

PLAN_NAME = "plan.json"
LOWER_IS_BETTER = ("loss",)  # ends of the names of metrics
LEAST_RATIO = 1.2  # of two rates of a grid; closer ones would be equal in two digits


@dataclass(frozen=True)
class Sweep:
    """What is run: a module with its arguments, and where its JSONs go."""

    module: str
    arguments: tuple[str, ...]
    rates: tuple[float, ...]
    seeds: int
    output: str
    max_rates: int = 9

    def path(self, method: str, rate: float, seed: int) -> str:
        return os.path.join(self.output, f"{method.replace(',', '-')}-lr{rate:g}-seed{seed}.json")

    def run(self, method: str, rate: float, seed: int) -> dict:
        """The result of one run, which is started unless it is there; what it printed is in a .log while it runs."""
        path = self.path(method, rate, seed)
        if not (os.path.exists(path) and read(path)["status"] == FINISHED):
            name, *others = method.split(",")
            own = [part for item in others for part in option(item)]
            command = [sys.executable, "-m", self.module, *self.arguments, "--method", name, *own]
            command += ["--learning-rate", f"{rate:g}", "--seed", str(seed), "--output", path]
            log, before = f"{path}.log", _modified(path)
            with open(log, "w", encoding="utf-8") as file:
                code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
            if code == 0:
                os.unlink(log)
            elif _modified(path) == before:  # it was killed, or failed before it could say so
                settings = {"method": name, "learning_rate": rate, "seed": seed}
                failed = {"status": FAILED, "settings": settings, "error": f"exit status {code}: see {log}"}
                replace_file(path, to_json(failed))
        return read(path)


def _modified(path: str) -> int | None:
    return os.stat(path).st_mtime_ns if os.path.exists(path) else None


def option(item: str) -> list[str]:
    """ "scaling_interval=1" as a command line has it; a field set to True or False is a switch."""
    name, _, value = item.partition("=")
    name = name.replace("_", "-")
    return {"True": [f"--{name}"], "False": [f"--no-{name}"]}.get(value, [f"--{name}", value])


def dev_value(result: dict) -> float:
    """The dev metric at the end of a run, made so that higher is better; -inf of a run that failed."""
    if result["status"] != FINISHED:
        return float("-inf")
    value = result["curve"][-1][result["dev_metric"]]
    value = -value if result["dev_metric"].endswith(LOWER_IS_BETTER) else value
    return value if value == value else float("-inf")


def best_rate(values: dict[float, float]) -> float:
    """The rate of the highest value; of equal ones that nearest to the middle of the grid."""
    rates = sorted(values)
    middle = (len(rates) - 1) / 2
    return max(rates, key=lambda rate: (values[rate], -abs(rates.index(rate) - middle)))


def next_rate(values: dict[float, float]) -> float | None:
    """The rate to try beyond an end of the grid that is as good as the best so far; None if there is no such end.

    Where all rates are equal, as those of a classifier that always says the same, the grid grows at both ends in turn.
    """
    rates, best = sorted(values), max(values.values())
    ends = [rate for rate in (rates[0], rates[-1]) if values[rate] == best != float("-inf")]
    if not ends:
        return None
    end = ends[len(values) % len(ends)]
    return float(f"{end * (rates[0] / rates[1] if end == rates[0] else rates[-1] / rates[-2]):.2g}")


def tune(sweep: Sweep, method: str, storage: str, progress: tqdm) -> None:
    """Grid on the first seed, extended until its best is inside, then the other seeds at the best rate.

    The untrained model is run once.
    """
    if method == UNTRAINED:
        sweep.run(method, sweep.rates[0], 0)
        return
    name = os.path.join(os.path.basename(sweep.output), method)
    study = optuna.create_study(study_name=name, storage=storage, direction="maximize", load_if_exists=True)
    values: dict[float, float] = {}
    waiting = list(sweep.rates)
    while waiting:
        rate = waiting.pop(0)
        progress.set_postfix_str(f"{method} {rate:g}")
        values[rate] = dev_value(sweep.run(method, rate, 0))
        note(study, rate, values[rate])
        progress.update()
        if not waiting and len(values) < sweep.max_rates:
            further = next_rate(values)
            waiting = [] if further is None else [further]
    if values[best_rate(values)] == float("-inf"):
        return
    for seed in range(1, sweep.seeds):
        sweep.run(method, best_rate(values), seed)
        progress.update()


def note(study: optuna.Study, rate: float, value: float) -> None:
    """Keep a trial in the study, once."""
    failed = value == float("-inf")
    state = optuna.trial.TrialState.FAIL if failed else optuna.trial.TrialState.COMPLETE
    if any(trial.state == state and trial.params["learning_rate"] == rate for trial in study.trials):
        return
    study.enqueue_trial({"learning_rate": rate})
    trial = study.ask()
    trial.suggest_float("learning_rate", 1e-8, 1e3, log=True)
    study.tell(trial, None if failed else value, state=state)


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
    changed = [name for name, value in plan.items() if before[name] != value]
    if changed:
        raise ValueError(f"{path} is of a sweep with other {', '.join(changed)}: choose another --output.")
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
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = f"sqlite:///{os.path.join(sweep.output, 'sweep.db')}"
    optuna.storages.RDBStorage(storage)  # makes the tables before several threads would
    total = len(arguments.methods) * (len(sweep.rates) + sweep.seeds - 1)
    with tqdm(total=total, desc="runs") as progress, ThreadPoolExecutor(arguments.jobs) as pool:
        for done in [pool.submit(tune, sweep, method, storage, progress) for method in arguments.methods]:
            done.result()


if __name__ == "__main__":
    main()
