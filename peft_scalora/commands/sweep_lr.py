"""Find the best learning rate of a fine-tuning, and where it blows up."""

from __future__ import annotations

import argparse

from .searches import add_search_settings, recorded, search_settings, trainer_of

_SEARCHED = ("learning_rate",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    add_search_settings(parser, _SEARCHED)
    parser.add_argument("--low", type=float, default=1e-6, help="lowest learning rate (default 1e-6)")
    parser.add_argument("--high", type=float, default=1.0, help="highest learning rate (default 1)")
    parser.add_argument("--per-decade", type=int, default=2, help="learning rates for each power of ten (default 2)")
    parser.add_argument("--check-steps", type=int, default=500, help="of the run at twice the best (default 500)")


def check(arguments: argparse.Namespace) -> None:
    """Replace the options by the settings of the runs."""
    arguments.settings = search_settings(arguments, _SEARCHED)


def run(arguments: argparse.Namespace) -> None:
    """Run the sweep and print its result."""
    from ..stability.learning_rate import sweep_learning_rate

    settings = arguments.settings
    result = sweep_learning_rate(
        lambda learning_rate: trainer_of(settings, learning_rate=learning_rate),
        low=arguments.low,
        high=arguments.high,
        per_decade=arguments.per_decade,
        check_steps=arguments.check_steps,
        output=settings["output"],
        storage=arguments.storage,
        settings=recorded(settings),
    )
    blown = result.unstable_base_learning_rate
    print(
        f"best learning rate {result.best_learning_rate:g}, {f'unstable from {blown:g}' if blown else 'none unstable'}"
    )
    print(f"{result.advice}\nruns and plot are in {settings['output']}")
