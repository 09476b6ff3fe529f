"""Checks of the folders that commands are given."""

from __future__ import annotations

import os


def refuse_no_folder(name: str, folder: str) -> None:
    """Refuse an argument that is not an existing folder.

    Raises:
        ValueError: names the argument and its value.
    """
    if not os.path.isdir(folder):
        raise ValueError(f"{name}={folder!r} is not a folder.")
