"""The command peft-scalora. It reads its arguments before it imports torch, so help and typos are answered at once."""

from __future__ import annotations

import argparse
import os
import sys
from difflib import get_close_matches
from importlib import import_module

from .finetuning.settings import suggestion
from .version import __version__

_COMMANDS = {
    "finetune": "fine-tune a model with ScaLoRA or LoRA",
    "evaluate": "evaluate a fine-tuned adapter on data",
    "generate": "continue prompts with a fine-tuned adapter",
    "info": "rank per layer, size and discarded energy of an adapter folder",
    "export": "write an adapter as plain LoRA, loadable without this package",
    "trl": "run one of TRL's training scripts on a ScaLoRA adapter",
    "sweep-lr": "find the best learning rate of a fine-tuning, and where it blows up",
    "search-warmup": "find the warmup with which a fine-tuning is stable",
}


class _Parser(argparse.ArgumentParser):
    """Parser that takes underscores for hyphens in options and suggests the option meant by a misspelt one."""

    def __init__(self, **options):
        self.options: list[str] = []
        super().__init__(**options)

    def add_argument(self, *names: str, **options):
        self.options += [name for name in names if name.startswith("--")]
        return super().add_argument(*names, **options)

    def parse_known_args(self, args=None, namespace=None):
        return super().parse_known_args([_with_hyphens(argument) for argument in args or []], namespace)

    def error(self, message: str):
        """End the process with one line, not with the usage of all options."""
        self.exit(2, f"{self.prog}: {message} (--help lists what there is)\n")

    def refuse_unknown(self, unknown: list[str]) -> None:
        """End the process with what was not understood, if there is anything."""
        for argument in unknown:
            close = get_close_matches(argument.partition("=")[0], self.options, 1)
            self.error(f"unknown argument {argument}{suggestion(close)}")


def _with_hyphens(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit status.

    0: done. 1: an error that the user can mend, printed in one line. 2: arguments that are not understood. 3: the loss
    of a run blew up, which was saved all the same. 130: interrupted.
    """
    command, arguments = _parse(sys.argv[1:] if argv is None else argv)
    trace = arguments.traceback
    del arguments.traceback
    try:
        command.check(arguments)
        _register()
        return command.run(arguments) or 0
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        if trace:
            raise
        hint = " (--traceback shows where)" if isinstance(error, RuntimeError) else ""
        _complain(f"{' '.join(str(error).split())}{hint}")
        return 1
    except KeyboardInterrupt as error:
        if trace:
            raise
        _complain(f"interrupted {error}".rstrip())
        return 130


def _parse(argv: list[str]) -> tuple:
    """Return the module of the command and its arguments."""
    parser = _Parser(prog="peft-scalora", description="High-rank fine-tuning at LoRA's cost.")
    parser.add_argument("--version", action="version", version=f"peft-scalora {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    modules, parsers = {}, {}
    for name, help in _COMMANDS.items():
        modules[name] = import_module(f".commands.{name.replace('-', '_')}", __package__)
        parsers[name] = subparsers.add_parser(name, help=help, description=modules[name].__doc__)
        modules[name].add_arguments(parsers[name])
        parsers[name].add_argument("--traceback", action="store_true", help="show where an error comes from")
    _refuse_unknown_command(parser, argv)
    arguments, unknown = parser.parse_known_args(argv)
    name = arguments.command
    parsers[name].refuse_unknown(unknown)
    del arguments.command
    return modules[name], arguments


def _refuse_unknown_command(parser: _Parser, argv: list[str]) -> None:
    if not argv:
        parser.error(f"a command is missing: {', '.join(_COMMANDS)}")
    if not argv[0].startswith("-") and argv[0] not in _COMMANDS:
        parser.error(f"unknown command {argv[0]}{suggestion(get_close_matches(argv[0], _COMMANDS, 1))}")


def _register() -> None:
    from .register import register

    register()


def _complain(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"peft-scalora: {text}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
