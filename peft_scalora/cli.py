"""The command peft-scalora."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import MISSING, fields

from .maths.scaling import SCALINGS

_HELP = {
    "model": "a local folder or an id on the hub",
    "data": "a JSONL, JSON, CSV or Parquet file (also .gz), or a dataset on the hub: name or name:config",
    "task": "causal-lm or classification",
    "output": "folder for adapter, metrics, plots and checkpoints; an interrupted run continues there",
    "method": "scalora or lora",
    "eval_data": "held-out data; without it some rows of the data are held out",
    "test_data": "data to report test_* metrics on, apart from what settings were chosen by",
    "text_fields": "comma-separated fields of the text (one, or a pair for classification)",
    "label_field": "field of the label: any strings or whole numbers for classes, fractions for regression",
    "prompt_field": "field of the prompt, which is not trained on; to an instruction its field input is added",
    "completion_field": "field of the completion",
    "target_modules": "modules to adapt, comma-separated, or all-linear",
    "scaling": f"one of {', '.join(SCALINGS)}",
    "scaling_interval": "optimizer steps from one rescaling to the next",
    "smoothness": "smoothness constant L, or auto",
    "accumulator_rank": "rank R of the accumulated change; 8 r unless given",
    "max_steps": "stop after this many steps instead of after the epochs",
}
_NOT_SEARCHED = ("test_data", "logging_steps", "save_steps")  # settings that mean nothing to the runs of a search


def main(argv: list[str] | None = None) -> int:
    """Run one command; errors that the user can mend are printed in one line."""
    parser = argparse.ArgumentParser(prog="peft-scalora", description="High-rank fine-tuning at LoRA's cost.")
    commands = parser.add_subparsers(dest="command", required=True)
    _add_settings(commands.add_parser("finetune", help="fine-tune a model with ScaLoRA or LoRA"))
    _add_searches(commands)
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
    run = {
        "finetune": _run_finetune,
        "info": _run_info,
        "export": _run_export,
        "sweep-lr": _run_sweep,
        "search-warmup": _run_warmup,
    }[arguments.command]
    try:
        run(arguments)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        print(f"peft-scalora: {error}", file=sys.stderr)
        return 1
    return 0


def _add_settings(parser: argparse.ArgumentParser, without: tuple[str, ...] = ()) -> None:
    """The settings of a fine-tuning run, but for some."""
    from .finetuning.run import FinetuneSettings

    for setting in fields(FinetuneSettings):
        name, default = setting.name, setting.default
        if name in without:
            continue
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


def _add_searches(commands) -> None:
    sweep = commands.add_parser("sweep-lr", help="find the best learning rate of a fine-tuning, and where it blows up")
    _add_settings(sweep, without=("learning_rate", *_NOT_SEARCHED))
    sweep.add_argument("--low", type=float, default=1e-6, help="lowest learning rate (default 1e-6)")
    sweep.add_argument("--high", type=float, default=1.0, help="highest learning rate (default 1)")
    sweep.add_argument("--per-decade", type=int, default=2, help="learning rates for each power of ten (default 2)")
    sweep.add_argument("--check-steps", type=int, default=500, help="of the run at twice the best (default 500)")
    warmup = commands.add_parser("search-warmup", help="find the warmup with which a fine-tuning is stable")
    _add_settings(warmup, without=("learning_rate", "warmup_ratio", "max_steps", *_NOT_SEARCHED))
    help = "length of the training that the warmup is for, which is at most a tenth of it"
    warmup.add_argument("--max-steps", type=int, required=True, help=help)
    help = "where training blows up without warmup, as sweep-lr finds it"
    warmup.add_argument("--unstable-learning-rate", type=float, required=True, help=help)
    for parser in (sweep, warmup):
        parser.add_argument("--storage", help="optuna database URL that processes share (default OUTPUT/study.db)")


def _run_sweep(arguments: argparse.Namespace) -> None:
    from .stability.learning_rate import sweep_learning_rate

    settings, own = _search_settings(arguments, "low", "high", "per_decade", "check_steps")
    result = sweep_learning_rate(
        lambda learning_rate: _trainer(settings, learning_rate=learning_rate),
        output=settings["output"],
        storage=arguments.storage,
        settings={name: value for name, value in settings.items() if name != "output"},
        **own,
    )
    print(f"best learning rate {result.best_learning_rate:g}, unstable from {result.unstable_base_learning_rate}")
    print(f"{result.advice}\nruns and plot are in {settings['output']}")


def _run_warmup(arguments: argparse.Namespace) -> None:
    from .stability.warmup import search_warmup

    settings, own = _search_settings(arguments, "unstable_learning_rate")
    result = search_warmup(
        lambda learning_rate, warmup_steps, max_steps: _trainer(settings, learning_rate=learning_rate),
        own["unstable_learning_rate"],
        settings["max_steps"],
        output=settings["output"],
        storage=arguments.storage,
        settings={name: value for name, value in settings.items() if name != "output"},
    )
    print(f"{result.advice}\nruns and plot are in {settings['output']}")


def _search_settings(arguments: argparse.Namespace, *own: str) -> tuple[dict, dict]:
    """The settings of the fine-tuning runs, and those of the search itself."""
    settings = {name: value for name, value in vars(arguments).items() if name not in ("command", "storage")}
    return settings, {name: settings.pop(name) for name in own}


def _trainer(settings: dict, **changed):
    from .finetuning.run import FinetuneSettings, make_trainer

    return make_trainer(FinetuneSettings(**settings | changed))


def _run_finetune(arguments: argparse.Namespace) -> None:
    from .finetuning.run import FinetuneSettings, finetune

    settings = vars(arguments)
    settings.pop("command")
    metrics = finetune(FinetuneSettings(**settings))
    shown = {name: value for name, value in metrics.items() if name not in ("labels", "log", "settings")}
    print(json.dumps(shown, indent=1))


def _run_info(arguments: argparse.Namespace) -> None:
    from .export.info import adapter_info, format_info

    info = adapter_info(arguments.adapter, arguments.tol)
    print(json.dumps(info, indent=1) if arguments.json else format_info(info))


def _run_export(arguments: argparse.Namespace) -> None:
    if arguments.merged:
        return _run_export_merged(arguments)
    from .export.lora import export_folder

    report = export_folder(arguments.adapter, arguments.output, rank=arguments.rank)
    error, size = f"{report.relative_error:.3g}", f"{report.size:,}"
    print(f"wrote {report.path}: LoRA of rank {report.rank}, relative error {error}, {size} bytes")
    if report.obstacles:
        print(f"vLLM will not serve it: {'; '.join(report.obstacles)}")
    else:
        print(f"vLLM serves it with --enable-lora --max-lora-rank {report.max_lora_rank}")


def _run_export_merged(arguments: argparse.Namespace) -> None:
    from .export.merged import export_merged_folder

    if arguments.rank is not None:
        raise ValueError("--rank and --merged exclude each other: a merged model has no adapter to truncate.")
    report = export_merged_folder(arguments.adapter, arguments.output, base=arguments.base)
    print(
        f"wrote {report.path}: merged model in {str(report.dtype).removeprefix('torch.')}, rounding changed the "
        f"adapter's change by {report.relative_error:.3g}, {report.size:,} bytes"
    )
