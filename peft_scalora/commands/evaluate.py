"""Evaluate the adapter of a finished run on other data, by the settings it was trained with."""

from __future__ import annotations

import argparse
import json

from .folders import refuse_no_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    parser.add_argument("run", help="output folder of a fine-tuning")
    parser.add_argument("--data", required=True, help="rows to evaluate on, as finetune takes them")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")


def check(arguments: argparse.Namespace) -> None:
    """Refuse what is no folder."""
    refuse_no_folder("run", arguments.run)


def run(arguments: argparse.Namespace) -> None:
    """Print the figures."""
    from ..finetuning.use import evaluate_run

    metrics = evaluate_run(arguments.run, arguments.data)
    if arguments.json:
        print(json.dumps(metrics, indent=1))
        return
    print("\n".join(f"{name} {value:.6g}" for name, value in metrics.items()))
