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
import os
from dataclasses import asdict, replace

from eval.harness.record import kept, read_all

from .gauss_newton_report import merit, steps_to_target, write_report
from .gauss_newton_run import BASELINES, GAUSS_NEWTON, METHODS, Setting, run

RATES = {
    "adamw": (3e-3, 1e-2, 3e-2),
    "muon": (2e-2, 3e-2, 6e-2, 1e-1),
    "soap": (5e-3, 1e-2, 2e-2),
    **dict.fromkeys(GAUSS_NEWTON, (3e-3, 5e-3, 8e-3, 1.2e-2)),
}
BATCH_SIZES_OF = ("muon", "gn")  # methods that are compared at several sizes of batches


def study(arguments: argparse.Namespace) -> None:
    """Train each method: the grid on the first seed, the best rate on the others, the grid at other batch sizes."""

    def result(setting: Setting, **changes) -> dict:
        setting = replace(setting, **changes)
        path = os.path.join(arguments.output, "study", f"{setting.name()}.json")
        data = arguments.data and os.path.basename(arguments.data)
        return kept(path, asdict(setting) | {"data": data}, lambda: run(setting, arguments.data))

    for method in arguments.methods:
        limit = arguments.max_steps if method in BASELINES else arguments.max_steps // 3
        setting = Setting(method, 0.0, target=arguments.target, max_steps=limit)
        rates = arguments.learning_rates or RATES[method]
        grid = [result(setting, learning_rate=rate) for rate in rates]
        best = min(grid, key=merit)["settings"]["learning_rate"]
        if min(map(steps_to_target, grid)) == float("inf"):
            continue  # no seed will tell more
        for seed in arguments.seeds:
            result(setting, learning_rate=best, seed=seed)
        for inner_steps in arguments.batch_sizes if method in BATCH_SIZES_OF else ():
            for rate in rates:  # every batch size needs its own
                result(setting, learning_rate=rate, inner_steps=inner_steps, max_steps=4 * arguments.max_steps)


def report(arguments: argparse.Namespace) -> None:
    """Write tables and plots of all runs in the output folder."""
    print(write_report(arguments.output, read_all(os.path.join(arguments.output, "study"))))


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
