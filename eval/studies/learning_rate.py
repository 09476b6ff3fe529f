"""Does a coarse learning-rate sweep find what a dense one finds? ScaLoRA on CoLA, two points a decade against six.

Both run in their own study with their own seed, so that they agree on the task and not on its noise.

    python -m eval.studies.learning_rate --model MINILM --data cola/train.jsonl.gz \\
        --eval-data cola/validation.jsonl.gz --output results/stability
"""

from __future__ import annotations

import argparse
import json
import math
import os

from peft_scalora.files.atomic import replace_file
from peft_scalora.finetuning.run import FinetuneSettings, make_trainer
from peft_scalora.plots import finish_panel, panels, save_png
from peft_scalora.stability import sweep_learning_rate

PER_DECADE = {"dense": 6, "coarse": 2}


def sweep(arguments: argparse.Namespace, name: str, seed: int):
    """Run one sweep of ScaLoRA; it continues if it was interrupted."""
    settings = {
        "model": arguments.model,
        "data": arguments.data,
        "eval_data": arguments.eval_data,
        "eval_rows": arguments.eval_rows,
        "task": "classification",
        "r": 4,
        "lora_alpha": 8,
        "batch_size": 16,
        "max_steps": arguments.steps,
        "max_length": 64,
        "seed": seed,
    }
    folder = os.path.join(arguments.work, name)
    return sweep_learning_rate(
        lambda rate: make_trainer(FinetuneSettings(**settings, output=folder, learning_rate=rate)),
        arguments.low,
        arguments.high,
        PER_DECADE[name],
        output=folder,
        check_steps=arguments.check_steps if name == "coarse" else 0,
        settings=settings,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--eval-data", required=True)
    parser.add_argument("--eval-rows", type=int, default=200)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--check-steps", type=int, default=0)
    parser.add_argument("--low", type=float, default=1e-4)
    parser.add_argument("--high", type=float, default=1e-1)
    parser.add_argument("--work", default="runs/learning_rate", help="folder of the two studies")
    parser.add_argument("--output", default="runs/learning_rate")
    arguments = parser.parse_args()
    sweeps = {name: sweep(arguments, name, seed) for seed, name in enumerate(PER_DECADE)}
    os.makedirs(arguments.output, exist_ok=True)
    steps_apart = PER_DECADE["coarse"] * abs(
        math.log10(sweeps["coarse"].best_learning_rate / sweeps["dense"].best_learning_rate)
    )
    result = {
        name: {
            "learning_rates": found.learning_rates,
            "scores": [score if math.isfinite(score) else None for score in found.scores],
            "unstable": found.unstable,
            "best_learning_rate": found.best_learning_rate,
            "unstable_base_learning_rate": found.unstable_base_learning_rate,
        }
        for name, found in sweeps.items()
    }
    result |= {"coarse_grid_steps_apart": steps_apart, "steps": arguments.steps, "eval_rows": arguments.eval_rows}
    replace_file(os.path.join(arguments.output, "learning_rate.json"), json.dumps(result, indent=1))
    figure, ((axis,),) = panels(1)
    for name, found in sweeps.items():
        points = [(rate, score) for rate, score in zip(found.learning_rates, found.scores) if math.isfinite(score)]
        axis.plot(*zip(*points), marker=".", label=f"{name}, {PER_DECADE[name]} a decade")
    axis.set_xscale("log")
    finish_panel(axis, "Learning-rate sweeps", "learning rate", "held-out loss")
    axis.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncol=2)
    save_png(figure, os.path.join(arguments.output, "learning_rate.png"))
    for name, found in sweeps.items():
        print(f"{name}: best {found.best_learning_rate:.3g}, unstable from {found.unstable_base_learning_rate}")
    print(f"{steps_apart:.2f} coarse grid steps apart")


if __name__ == "__main__":
    main()
