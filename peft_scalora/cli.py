"""The command peft-scalora."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import MISSING, fields

_HELP = {
    "model": "a local folder or an id on the hub",
    "data": "a JSONL, JSON, CSV or Parquet file (also .gz), or a dataset on the hub: name or name:config",
    "task": "causal-lm or classification",
    "output": "folder for adapter, metrics, plots and checkpoints; an interrupted run continues there",
    "method": "scalora or lora",
    "eval_data": "held-out data; without it some rows of the data are held out",
    "test_data": "data to report test_* metrics on, apart from what settings were chosen by",
    "text_fields": "comma-separated fields of the text (one, or a pair for classification)",
    "target_modules": "modules to adapt, comma-separated, or all-linear",
    "scaling": "column, scalar or exact",
    "scaling_interval": "optimizer steps from one rescaling to the next",
    "smoothness": "smoothness constant L, or auto",
    "accumulator_rank": "rank R of the accumulated change; 8 r unless given",
    "max_steps": "stop after this many steps instead of after the epochs",
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; errors that the user can mend are printed in one line."""
    parser = argparse.ArgumentParser(prog="peft-scalora", description="High-rank fine-tuning at LoRA's cost.")
    commands = parser.add_subparsers(dest="command", required=True)
    _add_finetune(commands)
    info = commands.add_parser("info", help="rank per layer, size and discarded energy of an adapter folder")
    info.add_argument("adapter", help="adapter folder")
    info.add_argument("--tol", type=float, default=0.01, help="fraction of the largest singular value (default 0.01)")
    info.add_argument("--json", action="store_true", help="print JSON")
    export = commands.add_parser("export", help="write an adapter as plain LoRA, loadable without this package")
    export.add_argument("adapter", help="adapter folder")
    export.add_argument("output", help="new folder")
    export.add_argument("--rank", type=int, help="truncate to this rank; without it the export is exact")
    export.add_argument("--merged", action="store_true", help="write base model and adapter as one model instead")
    export.add_argument("--base", help="base model to merge into; the one the adapter was trained on unless given")
    arguments = parser.parse_args(argv)
    run = {"finetune": _run_finetune, "info": _run_info, "export": _run_export}[arguments.command]
    try:
        run(arguments)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        print(f"peft-scalora: {error}", file=sys.stderr)
        return 1
    return 0


def _add_finetune(commands) -> None:
    from .finetune import FinetuneSettings

    parser = commands.add_parser("finetune", help="fine-tune a model with ScaLoRA or LoRA")
    for setting in fields(FinetuneSettings):
        name, default = setting.name, setting.default
        options = {"help": _HELP.get(name), "required": default is MISSING}
        if default is not MISSING:
            options["default"] = default
            options["help"] = f"{options['help'] or ''} (default {default!r})".strip()
        if isinstance(default, bool):
            options["action"] = argparse.BooleanOptionalAction
        elif name == "text_fields":
            options["type"] = lambda text: tuple(text.split(","))
        elif name == "smoothness":
            options["type"] = lambda text: text if text == "auto" else float(text)
        elif name == "accumulator_rank":
            options["type"] = int
        elif default is not MISSING and default is not None:
            options["type"] = type(default)
        parser.add_argument(f"--{name.replace('_', '-')}", **options)


def _run_finetune(arguments: argparse.Namespace) -> None:
    from .finetune import FinetuneSettings, finetune

    settings = vars(arguments)
    settings.pop("command")
    metrics = finetune(FinetuneSettings(**settings))
    shown = {name: value for name, value in metrics.items() if name not in ("log", "settings")}
    print(json.dumps(shown, indent=1))


def _run_info(arguments: argparse.Namespace) -> None:
    from .info import adapter_info, format_info

    info = adapter_info(arguments.adapter, arguments.tol)
    print(json.dumps(info, indent=1) if arguments.json else format_info(info))


def _run_export(arguments: argparse.Namespace) -> None:
    if arguments.merged:
        return _run_export_merged(arguments)
    from .export import export_folder

    report = export_folder(arguments.adapter, arguments.output, rank=arguments.rank)
    error, size = f"{report.relative_error:.3g}", f"{report.size:,}"
    print(f"wrote {report.path}: LoRA of rank {report.rank}, relative error {error}, {size} bytes")
    if report.obstacles:
        print(f"vLLM will not serve it: {'; '.join(report.obstacles)}")
    else:
        print(f"vLLM serves it with --enable-lora --max-lora-rank {report.max_lora_rank}")


def _run_export_merged(arguments: argparse.Namespace) -> None:
    from .merged import export_merged_folder

    if arguments.rank is not None:
        raise ValueError("--rank and --merged exclude each other: a merged model has no adapter to truncate.")
    report = export_merged_folder(arguments.adapter, arguments.output, base=arguments.base)
    print(
        f"wrote {report.path}: merged model in {str(report.dtype).removeprefix('torch.')}, rounding changed the "
        f"adapter's change by {report.relative_error:.3g}, {report.size:,} bytes"
    )
