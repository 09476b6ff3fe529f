"""Parts that the two searches over fine-tuning runs share: their settings and the Trainer of one run."""

from __future__ import annotations

import argparse
from dataclasses import asdict, fields

from ..finetuning.settings import FinetuneSettings
from .settings_arguments import add_settings, take_settings

# Settings that mean nothing to the runs of a search.
_NOT_SEARCHED = (
    "test_data",
    "logging_steps",
    "save_steps",
    "eval_steps",
    "early_stopping_patience",
    "report_to",
)


def add_search_settings(parser: argparse.ArgumentParser, without: tuple[str, ...]) -> None:
    """Add the settings of a run but those that are searched, and where processes share a study."""
    add_settings(parser, without=(*without, *_NOT_SEARCHED))
    parser.add_argument("--storage", help="optuna database URL that processes share (default OUTPUT/study.db)")


def search_settings(arguments: argparse.Namespace, without: tuple[str, ...], **searched) -> dict:
    """Return all settings of the runs but those that are searched, with what the search itself sets among them.

    Raises:
        ValueError: a setting is missing, unknown or not allowed.
    """
    values = take_settings(arguments)
    given = [name for name in (*without, *_NOT_SEARCHED) if values.pop(name, None) is not None]
    if given:
        raise ValueError(f"{', '.join(given)} cannot be set for a search, which sets them itself: leave them out.")
    checked = asdict(FinetuneSettings.of(values | searched))
    left_out = ({*without, *_NOT_SEARCHED}) - set(searched)
    return {setting.name: checked[setting.name] for setting in fields(FinetuneSettings) if setting.name not in left_out}


def trainer_of(settings: dict, **changed):
    """Return the Trainer of one run of a search, which is a line and not one line for each of its steps."""
    from ..finetuning.run import make_trainer
    from ..finetuning.training import LogLines

    trainer = make_trainer(FinetuneSettings.of(settings | changed))
    trainer.remove_callback(LogLines)
    return trainer


def recorded(settings: dict) -> dict:
    """Return the settings that decide a study's results."""
    return {name: value for name, value in settings.items() if name != "output"}
