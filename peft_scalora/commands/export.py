"""Write an adapter as plain LoRA, loadable without this package, or merged into its base model."""

from __future__ import annotations

import argparse

from .folders import refuse_no_folder

_DTYPES = ("float32", "bfloat16", "float16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    parser.add_argument("adapter", help="adapter folder")
    parser.add_argument("output", help="new folder")
    parser.add_argument("--rank", type=int, help="truncate to this rank; without it the export is exact")
    parser.add_argument(
        "--dtype",
        choices=_DTYPES,
        help="number format of what is written; float32 unless given, or the base model's with --merged",
    )
    parser.add_argument("--merged", action="store_true", help="write base model and adapter as one model instead")
    parser.add_argument("--base", help="base model to merge into; the one the adapter was trained on unless given")


def check(arguments: argparse.Namespace) -> None:
    """Refuse what is no folder, and options that exclude each other."""
    refuse_no_folder("adapter", arguments.adapter)
    if arguments.merged and arguments.rank is not None:
        raise ValueError("--rank and --merged exclude each other: a merged model has no adapter to truncate.")


def run(arguments: argparse.Namespace) -> None:
    """Write the folder and print what it holds."""
    if arguments.merged:
        _run_merged(arguments)
        return
    import torch

    from ..export.lora import export_folder

    dtype = getattr(torch, arguments.dtype or "float32")
    print(export_folder(arguments.adapter, arguments.output, rank=arguments.rank, dtype=dtype))


def _run_merged(arguments: argparse.Namespace) -> None:
    import torch

    from ..export.merged import export_merged_folder

    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    report = export_merged_folder(arguments.adapter, arguments.output, base=arguments.base, dtype=dtype)
    print(
        f"wrote {report.path}: merged model in {str(report.dtype).removeprefix('torch.')}, rounding changed the "
        f"adapter's change by {report.relative_error:.3g}, {report.size:,} bytes"
    )
