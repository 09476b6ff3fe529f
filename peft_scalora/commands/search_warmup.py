"""Find the warmup with which a fine-tuning is stable."""

from __future__ import annotations

import argparse

from .searches import add_search_settings, recorded, search_settings, trainer_of

_SEARCHED = ("learning_rate", "warmup_ratio")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    add_search_settings(parser, (*_SEARCHED, "max_steps"))
    help = "length of the training that the warmup is for, which is at most a tenth of it"
    parser.add_argument("--max-steps", type=int, required=True, help=help)
    help = "where training blows up without warmup, as sweep-lr finds it"
    parser.add_argument("--unstable-learning-rate", type=float, required=True, help=help)


def check(arguments: argparse.Namespace) -> None:
    """Replace the options by the settings of the runs."""
    arguments.settings = search_settings(arguments, _SEARCHED)


def run(arguments: argparse.Namespace) -> None:
    """Run the search and print its result."""
    from ..stability.warmup import search_warmup

    settings = arguments.settings
    result = search_warmup(
        lambda learning_rate, warmup_steps, max_steps: trainer_of(settings, learning_rate=learning_rate),
        arguments.unstable_learning_rate,
        settings["max_steps"],
        output=settings["output"],
        storage=arguments.storage,
        settings=recorded(settings),
    )
    print(f"{result.advice}\nruns and plot are in {settings['output']}")
