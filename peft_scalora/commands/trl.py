"""Run one of TRL's training scripts on a ScaLoRA adapter. Takes what `trl` takes, and ScaLoRA's own settings."""

from __future__ import annotations

import argparse

SCRIPTS = ("sft", "dpo", "grpo", "kto", "reward", "rloo", "distillation")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the name of a script; all that follows is the script's own."""
    parser.add_argument("script", choices=SCRIPTS, help="TRL's training script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the script's arguments; --help lists them")


def check(arguments: argparse.Namespace) -> None:
    """Check nothing: TRL knows what its script may be given."""


def run(arguments: argparse.Namespace) -> None:
    """Train, as TRL does."""
    from ..integrations.trl import run_script

    run_script(arguments.script, arguments.arguments)
