"""Telling whether a place holds the run that is asked for, so that no run continues or overwrites another one."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping


def refuse_other_run(holder: str, there: Mapping, here: Mapping, remedy: str, may_change: Collection[str] = ()) -> None:
    """Refuse a place whose recorded settings are not those of this run.

    Settings are compared as JSON has them: a tuple is equal to a list. One that only one side has counts as None on the
    other.

    Args:
        holder: the place and what it holds, as the start of the message, such as "run.json holds a finished run".
        there: the recorded settings.
        here: the settings of this run.
        remedy: what the user may do, as the end of the message.
        may_change: names of settings that a run may be continued with other values of.

    Raises:
        ValueError: names every setting that differs, and its two values unless they are long.
    """
    changed = changed_settings(there, here, may_change)
    if changed:
        raise ValueError(f"{holder} with other settings ({', '.join(changed)}): {remedy}.")


def changed_settings(there: Mapping, here: Mapping, may_change: Collection[str] = ()) -> list[str]:
    """Return "name=value there, value here" for every setting that differs; the name alone of lists and mappings."""
    here = json.loads(json.dumps(dict(here)))
    names = sorted({*there, *here} - set(may_change))
    return [_told(name, there.get(name), here.get(name)) for name in names if there.get(name) != here.get(name)]


def _told(name: str, there, here) -> str:
    if isinstance(there, (list, dict)) or isinstance(here, (list, dict)):
        return name
    return f"{name}={there!r} there, {here!r} here"
