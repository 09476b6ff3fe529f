"""Options of a command out of the settings of a fine-tuning run, and back."""

from __future__ import annotations

import argparse
from collections.abc import Collection
from dataclasses import MISSING, Field, fields

from ..finetuning.settings import FinetuneSettings, read_settings


def add_settings(parser: argparse.ArgumentParser, without: Collection[str] = ()) -> None:
    """Add a file of settings, and one option for each setting but those of `without`.

    An option that is not given is absent from the arguments, so that the file's value stands.
    """
    parser.add_argument(
        "config", nargs="?", help="YAML or JSON file of settings, such as another run's settings.json; options override"
    )
    for setting in fields(FinetuneSettings):
        if setting.name not in without:
            option = f"--{setting.name.replace('_', '-')}"
            parser.add_argument(option, default=argparse.SUPPRESS, help=_help(setting), **_form(setting))


def _form(setting: Field) -> dict:
    if setting.type == "bool":
        return {"action": argparse.BooleanOptionalAction}
    allowed = setting.metadata["allowed"]
    if isinstance(allowed, tuple):
        return {"metavar": f"{{{','.join(allowed)}}}"}
    kind = setting.type.split(" ")[0]
    return {"metavar": {"int": "N", "float": "X"}.get(kind, setting.name.rpartition("_")[2].upper())}


def _help(setting: Field) -> str:
    text = setting.metadata["help"]
    allowed = setting.metadata["allowed"]
    if isinstance(allowed, str) and allowed:
        text += f"; {allowed}"
    if setting.default in (MISSING, None, "", ()):
        return text
    default = {True: "on", False: "off"}[setting.default] if setting.type == "bool" else setting.default
    return f"{text} (default {default})".replace("%", "%%")


def take_settings(arguments: argparse.Namespace) -> dict:
    """Return the settings that were given, in the file and by options, and remove them from the arguments."""
    values = read_settings(arguments.config) if arguments.config else {}
    del arguments.config
    for setting in fields(FinetuneSettings):
        if hasattr(arguments, setting.name):
            values[setting.name] = getattr(arguments, setting.name)
            delattr(arguments, setting.name)
    return values
