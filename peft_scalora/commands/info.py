"""Show rank per layer, size and discarded energy of an adapter folder."""

from __future__ import annotations

import argparse
import json

from .folders import refuse_no_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    parser.add_argument("adapter", help="adapter folder")
    parser.add_argument("--tol", type=float, default=0.01, help="fraction of the largest singular value (default 0.01)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def check(arguments: argparse.Namespace) -> None:
    """Refuse what is no folder."""
    refuse_no_folder("adapter", arguments.adapter)


def run(arguments: argparse.Namespace) -> None:
    """Print the figures."""
    from ..export.info import adapter_info, format_info

    info = adapter_info(arguments.adapter, arguments.tol)
    print(json.dumps(info, indent=1) if arguments.json else format_info(info))
