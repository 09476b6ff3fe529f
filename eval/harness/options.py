"""Command lines of dataclasses: an option for every field, with the help of its metadata."""

from __future__ import annotations

from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import MISSING, Field, dataclass, field, fields

from transformers import HfArgumentParser


class _HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Show defaults, and the description as it is written."""


def option(default=MISSING, help: str = "", **arguments) -> Field:
    """Return a dataclass field that `parse` makes an option of.

    Args:
        default: of the field; without one the option is required.
        help: what the option is.
        arguments: others of ArgumentParser.add_argument, such as `choices`.
    """
    return field(default=default, metadata={"help": help, **arguments})


def several(default: Sequence, help: str = "", **arguments) -> Field:
    """Return a dataclass field for a list, that `parse` makes an option with one or more values of."""
    return field(default_factory=lambda: list(default), metadata={"help": help, **arguments})


def parse(description: str, kinds: Sequence[type], arguments: Sequence[str] | None = None, **defaults) -> list:
    """Return an instance of each dataclass, from the command line unless `arguments` are given.

    Args:
        description: the start of the help.
        kinds: dataclasses, no two of which have a field of one name.
        defaults: defaults that are not those of the fields.
    """
    parser = HfArgumentParser(kinds, description=description, formatter_class=_HelpFormatter)
    parser.set_defaults(**defaults)
    *found, unknown = parser.parse_args_into_dataclasses(
        arguments, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return found


def check_choices(settings) -> None:
    """Refuse a value that is none of its field's choices.

    Raises:
        ValueError: names the field, its value and the choices.
    """
    for each in fields(settings):
        choices = each.metadata.get("choices")
        given = getattr(settings, each.name)
        for value in given if isinstance(given, (list, tuple)) else [given]:
            if choices and value not in choices:
                raise ValueError(f"{each.name}={value!r} must be one of {', '.join(choices)}.")


def check_counts(settings, names: Sequence[str]) -> None:
    """Refuse numbers below 1; None passes.

    Raises:
        ValueError: names the field and its value.
    """
    for name in names:
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1.")


@dataclass(frozen=True)
class Place:
    """Where a run's rows are, and where its results go."""

    output: str = option(help="the run's JSON")
    data_dir: str | None = option(None, "folder with the data, as docs/evaluation.md shows it; the hub unless given")
    save_adapter: bool = option(False, "keep the trained adapter in OUTPUT.adapter")
