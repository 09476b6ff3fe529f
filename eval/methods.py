"""Model-optimization methods side by side on one model: quality, size, memory, speed and what they took.

    python -m eval.methods --model MINILM --task sst2 --methods all --output results/methods/minilm-sst2

Every method starts from the same fine-tuned dense model (row `dense`), or from another row's model. It is saved, loaded
again in a fresh process, and scored there: the score has to be the same to the last bit. Data come from the hub, or
from a folder with --data-dir. `--methods` takes modules (pruning) and rows (l1-50); rows that are finished are not
repeated. Models are kept below --models. The table and the plot are of all results in --output.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from types import ModuleType

import transformers

from eval.harness.options import option, parse, several
from eval.harness.record import checkpoints, clock, finished, recorded, short_hash
from eval.harness.training import Training, TrainingOptions, settings_of
from eval.optimizing import (
    combinations,
    distillation,
    finetuning,
    hyperparameters,
    pruning,
    quantization,
    structure,
)
from eval.optimizing.common import Context, Row, bytes_on_disk, count, on_device
from eval.optimizing.measure import in_fresh_process
from eval.optimizing.report import write_report
from eval.optimizing.tasks import Task, TaskSettings, load_task

MODULES = (finetuning, hyperparameters, pruning, quantization, structure, distillation, combinations)
MODULE_OF: dict[str, ModuleType] = {name: module for module in MODULES for name in module.ROWS}


def short_name(module: ModuleType) -> str:
    return module.__name__.rpartition(".")[2]


def row_of(name: str) -> Row:
    return MODULE_OF[name].ROWS[name]


def chosen_rows(methods: Sequence[str]) -> list[str]:
    """Return the names of the rows of `methods` (rows, modules, or "all"), in the table's order.

    Raises:
        ValueError: no such row or module.
    """
    known = {"all", *MODULE_OF, *map(short_name, MODULES)}
    unknown = [method for method in methods if method not in known]
    if unknown:
        raise ValueError(f"methods={unknown} must be among {', '.join(sorted(known))}.")
    wanted = set(methods)
    return [name for name, module in MODULE_OF.items() if wanted & {"all", name, short_name(module)}]


def with_requirements(names: Sequence[str]) -> Iterator[str]:
    """Yield the rows, each after the row that it starts from, once; "dense" first, which all are timed against."""
    seen = set()

    def visit(name: str) -> Iterator[str]:
        after = row_of(name).after
        if after is not None:
            yield from visit(after)
        if name not in seen:
            seen.add(name)
            yield name

    for name in ("dense", *names):
        yield from visit(name)


@dataclass(frozen=True)
class Run:
    """One model, one task, one seed: where its rows' models and results are."""

    task: Task
    task_settings: TaskSettings
    training: Training
    full_learning_rate: float
    search_trials: int
    models: str
    output: str

    def folder(self, name: str) -> str:
        return os.path.join(self.models, f"{_file_name(name)}-seed{self.training.seed}")

    def result_path(self, name: str) -> str:
        return os.path.join(self.output, f"{_file_name(name)}-seed{self.training.seed}.json")

    def settings(self, name: str) -> dict:
        rows = {k: v for k, v in asdict(self.task_settings).items() if k not in ("data_dir", "model")}
        others = {"full_learning_rate": self.full_learning_rate, "search_trials": self.search_trials}
        settings = settings_of(self.training, row=name, **rows, **others)
        del settings["method"]  # the row's own
        return settings

    def context(self, name: str) -> Context:
        before = [row for row in with_requirements([name]) if row != name]
        return Context(
            self.task,
            self.training,
            self.full_learning_rate,
            {row: self.folder(row) for row in before},
            {row: MODULE_OF[row].load for row in before},
            checkpoints(self.result_path(name)),
            self.search_trials,
        )

    def do(self, name: str) -> dict:
        """Return the row's result; unless it is there, build, save and load it in a fresh process that scores it."""
        identity = f"methods/{self.task.name}", self.settings(name), self.task.data
        found = finished(self.result_path(name), *identity)
        if found is not None and os.path.isdir(self.folder(name)):
            return found
        module, row, context = MODULE_OF[name], row_of(name), self.context(name)
        with recorded(self.result_path(name), *identity) as result:
            result |= {"method": short_name(module), "after": row.after, "caveat": row.caveat}
            result["metric"] = self.task.metric
            reason = self._unfit(row, module, context)
            if reason is not None:
                result["unfit"] = reason
                return result
            self._build(module, row, context, self.folder(name), result)
            fresh = in_fresh_process(
                self.task_settings, self.task, module.__name__, self.folder(name), self.folder("dense")
            )
            score = fresh.pop("score")
            result["reload"] = "equal" if score == result.pop("score") else "differs"
            result |= fresh | {"metrics": score["metrics"], "predictions": score["predictions"]}
        return result

    def _unfit(self, row: Row, module: ModuleType, context: Context) -> str | None:
        if row.after is not None and not os.path.isdir(self.folder(row.after)):
            return f"it starts from {row.after!r}, which there is none of"
        return module.misfit(row, context.base(row))

    def _build(self, module: ModuleType, row: Row, context: Context, folder: str, result: dict) -> None:
        """Build, count and score the row's model; its folder appears when all of it is written."""
        shutil.rmtree(folder, ignore_errors=True)
        staged = f"{folder}.staged"
        shutil.rmtree(staged, ignore_errors=True)
        started = clock()
        model = module.build(row, context, staged)
        result["seconds"] = context.earlier_seconds + clock() - started
        result |= context.figures | {"bytes": bytes_on_disk(staged)}
        result |= count(module.load(staged))  # dequantizing the int8 of bitsandbytes leaves a model that cannot be used
        result["score"] = asdict(self.task.score(on_device(model), "test"))
        os.rename(staged, folder)


def models_folder(models: str, output: str) -> str:
    """Return the folder below `models` for the rows of `output`; another output has another one."""
    output = os.path.realpath(output)
    return os.path.join(models, f"{os.path.basename(output)}-{short_hash(output)}")


def _file_name(name: str) -> str:
    return name.replace(", ", "-then-")


@dataclass(frozen=True)
class Comparison:
    """Which rows of the table are made, on which rows of data, and where they go."""

    output: str = option(help="folder for results, table and plot")
    task: str = option("sst2", "a GLUE task, or commonsense")
    data_dir: str | None = option(None, "folder with glue/ or commonsense/; the hub unless given")
    methods: list[str] = several(["all"], "all, modules or rows")  # noqa: RUF009
    seeds: list[int] = several([0], "of every row")  # noqa: RUF009
    full_learning_rate: float = option(1e-4, "where all weights are trained")
    search_trials: int = option(6, "of the hyperparameter search")
    train_rows: int | None = option(None, "all unless given")
    dev_rows: int = option(200, "taken out of the training rows")
    test_rows: int | None = option(None, "evaluation rows; all unless given")
    models: str = option("runs/methods", "folder for the models")


def parsed(arguments: Sequence[str] | None) -> tuple[Comparison, Training]:
    """Return what is compared, and how adapters are trained; rows are of `methods`, and have no curve."""
    comparison, options = parse(__doc__, (Comparison, TrainingOptions), arguments)
    return comparison, Training(**vars(options))


def runs(comparison: Comparison, training: Training) -> Iterator[Run]:
    """Yield a run for every seed."""
    names = ("task", "data_dir", "train_rows", "dev_rows", "test_rows")
    rows = {name: getattr(comparison, name) for name in names}
    task_settings = TaskSettings(training.model, max_length=training.max_length, **rows)
    task = load_task(task_settings)
    models = models_folder(comparison.models, comparison.output)
    for seed in comparison.seeds:
        yield Run(
            task,
            task_settings,
            replace(training, seed=seed),
            comparison.full_learning_rate,
            comparison.search_trials,
            models,
            comparison.output,
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing, and return the number of rows that failed."""
    comparison, training = parsed(arguments)
    transformers.logging.set_verbosity_error()  # every load of a base model reports that its head is new
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # every product on a CPU warns of a cast
    names = chosen_rows(comparison.methods)
    failed = 0
    for run in runs(comparison, training):
        for name in with_requirements(names):
            about = f"{name}, seed {run.training.seed}"
            try:
                result = run.do(name)
            except Exception as error:  # the row says so, and the others are worth having
                failed += 1
                print(f"{about}: failed: {error}", file=sys.stderr, flush=True)
                continue
            print(f"{about}: {result.get('unfit') or result['metrics']}", flush=True)
            write_report(comparison.output, list(MODULE_OF))
    write_report(comparison.output, list(MODULE_OF))
    return failed


if __name__ == "__main__":
    sys.exit(main())
