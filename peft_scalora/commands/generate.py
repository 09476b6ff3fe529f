"""Continue prompts with the adapter of a finished run. They are put to the model as its training rows were."""

from __future__ import annotations

import argparse
import sys

from .folders import refuse_no_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    parser.add_argument("run", help="output folder of a fine-tuning")
    parser.add_argument("--prompt", action="append", help="text to continue; may be given again; else lines of stdin")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="longest answer (default 128)")
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0: the likeliest token; above: sampled (default 0)"
    )


def check(arguments: argparse.Namespace) -> None:
    """Refuse what is no folder."""
    refuse_no_folder("run", arguments.run)


def run(arguments: argparse.Namespace) -> None:
    """Print one answer a prompt."""
    from ..finetuning.use import generate_answers

    prompts = arguments.prompt or [line.rstrip("\n") for line in sys.stdin]
    for answer in generate_answers(arguments.run, prompts, arguments.max_new_tokens, arguments.temperature):
        print(answer, flush=True)
