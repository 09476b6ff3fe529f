"""Fine-tune a model with ScaLoRA or LoRA. Settings come from a YAML or JSON file, from options, or from both."""

from __future__ import annotations

import argparse
import json
import os

from ..files.checkpoints import last_complete_checkpoint
from ..finetuning.output import is_main_process, refuse_foreign_files
from ..finetuning.settings import FinetuneSettings
from .settings_arguments import add_settings, take_settings

DIVERGED = 3  # exit status
_NOT_SHOWN = ("labels", "log", "settings", "fields", "data_hashes")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    add_settings(parser)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")


def check(arguments: argparse.Namespace) -> None:
    """Replace the options by the settings they mean, and refuse an output that is somebody else's."""
    arguments.settings = FinetuneSettings.of(take_settings(arguments))
    refuse_foreign_files(arguments.settings.output)


def run(arguments: argparse.Namespace) -> int:
    """Train, and say what came of it and where it is."""
    from ..finetuning.run import finetune

    settings = arguments.settings
    try:
        metrics = finetune(settings)
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(_how_to_go_on(settings.output)) from error
    if is_main_process():
        print(json.dumps(_shown(metrics), indent=1) if arguments.json else summary(metrics, settings))
    return DIVERGED if metrics.get("stability", {}).get("verdict") == "diverged" else 0


def _how_to_go_on(output: str) -> str:
    checkpoint = last_complete_checkpoint(output)
    if checkpoint is None:
        return "before the first checkpoint: the same command starts anew."
    return f"after {os.path.basename(checkpoint)}: the same command goes on from there."


def _shown(metrics: dict) -> dict:
    return {name: value for name, value in metrics.items() if name not in _NOT_SHOWN}


def summary(metrics: dict, settings: FinetuneSettings) -> str:
    """Return the results, the files and the next commands of a run; its warning, if there is one, comes first."""
    prefixes = ("eval_", "test_")
    timings = ("_runtime", "_per_second")
    results = {
        name.replace("_", " "): value
        for name, value in metrics.items()
        if name.startswith(prefixes) and not name.endswith(timings) and isinstance(value, (int, float))
    }
    output = settings.output
    size = f"{metrics['checkpoint_bytes'] / 2**20:.1f} MiB"
    files = [name for name in ("metrics.json", "loss.png", "scalora_rank.png") if os.path.exists(f"{output}/{name}")]
    lines = [
        f"{metrics['steps']} steps, training loss {metrics['train_loss']:.4g}, "
        + ", ".join(f"{name} {value:.4g}" for name, value in results.items()),
        f"{output} holds the adapter ({size}, mean effective rank {metrics['effective_rank']:.1f}), {', '.join(files)}",
        f"next: peft-scalora info {output}",
    ]
    if settings.task == "causal-lm":
        lines.append(f"      peft-scalora generate {output} --prompt '...'")
    lines.append(f"      peft-scalora evaluate {output} --data ROWS")
    if settings.method == "scalora":
        lines.append(f"      peft-scalora export {output} {os.path.normpath(output)}-lora")
    advice = metrics.get("stability", {}).get("advice")
    return "\n".join(([f"WARNING: {advice}"] if advice else []) + lines)
