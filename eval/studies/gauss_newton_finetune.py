"""Compare AdamW and Gauss-Newton in ordinary fine-tuning with LoRA and ScaLoRA, at equal data.

    python -m eval.studies.gauss_newton_finetune --model SMOLLM2 --data gsm8k/train.jsonl.gz \\
        --eval-data gsm8k/test.jsonl.gz

All runs see the same batches in the same order, so a step costs the same tokens. One JSON a run; runs that are there
already are not repeated. The best learning rate of each is in the table.
"""

from __future__ import annotations

import argparse
import gc
import os
import time
from collections import defaultdict
from collections.abc import Sequence
from functools import partial

from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, set_seed

from eval.harness.record import kept, read_all
from peft_scalora import GaussNewtonCallback, GaussNewtonConfig, ScaLoRAConfig
from peft_scalora.files.atomic import replace_file
from peft_scalora.files.tables import markdown
from peft_scalora.finetuning.data import Fields, encode, find_fields, load_rows
from peft_scalora.finetuning.prompts import load_tokenizer
from peft_scalora.finetuning.trainer import build_trainer

ADAPTERS = {"lora": LoraConfig, "scalora": ScaLoRAConfig}
SETTINGS = ("steps", "inner_steps", "batch_size", "max_length", "eval_rows", "seed")
RATES = {"adamw": (5e-4, 1e-3, 2e-3, 4e-3), "gn": (1e-3, 3e-3, 1e-2)}


def encoded(path: str, tokenizer, arguments: argparse.Namespace, rows: int):
    found = load_rows(path)
    fields = find_fields(found.column_names, "causal-lm", Fields())
    return encode(found.select(range(min(len(found), rows))), tokenizer, "causal-lm", fields, arguments.max_length)


def run(arguments: argparse.Namespace, adapter: str, method: str, rate: float) -> dict:
    tokenizer = load_tokenizer(arguments.model)
    train = encoded(arguments.data, tokenizer, arguments, 4 * arguments.steps * arguments.batch_size)
    held_out = encoded(arguments.eval_data, tokenizer, arguments, arguments.eval_rows)
    set_seed(arguments.seed)
    model = AutoModelForCausalLM.from_pretrained(arguments.model)
    config = ADAPTERS[adapter](r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    config.scaling_interval = 2 if method == "gn" else 10  # of outer steps
    gauss_newton = GaussNewtonConfig(variant="prox_linear", inner_steps=arguments.inner_steps, inner_optimizer="adamw")
    fields = {
        "output_dir": os.path.join("runs", "gauss_newton_finetune"),
        "learning_rate": rate,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": arguments.batch_size,
        "per_device_eval_batch_size": 8,
        "max_steps": arguments.steps,
        "logging_steps": arguments.inner_steps + 1,
        "save_strategy": "no",
        "seed": arguments.seed,
    }
    trainer = build_trainer(
        get_peft_model(model, config),
        fields,
        train_dataset=train,
        eval_dataset=held_out,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        callbacks=[GaussNewtonCallback(gauss_newton)] if method == "gn" else [],
    )
    before = trainer.evaluate()["eval_loss"]
    started = time.process_time()
    trainer.train()
    seconds = time.process_time() - started
    return {
        "adapter": adapter,
        "method": method,
        "learning_rate": rate,
        "loss_before": before,
        "loss": trainer.evaluate()["eval_loss"],
        "seconds": seconds,
        "log": trainer.state.log_history,
    }


def table(runs: Sequence[dict]) -> str:
    """Return a Markdown table of the best run of every adapter and optimizer."""
    by_name = defaultdict(list)
    for result in runs:
        by_name[f"{result['adapter']} {result['method']}"].append(result)
    rows = []
    for name, found in by_name.items():
        best = min(found, key=lambda result: result["loss"])
        tried = ", ".join(f"{rate:g}" for rate in sorted(result["learning_rate"] for result in found))
        loss = f"{best['loss_before']:.3f} → {best['loss']:.3f}"
        rows.append([name, f"{best['learning_rate']:g} ({tried})", loss, f"{best['seconds']:.0f}"])
    return markdown(["", "learning rate (tried)", "held-out answer loss", "CPU seconds"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="local folder or hub id")
    parser.add_argument("--data", required=True)
    parser.add_argument("--eval-data", required=True)
    parser.add_argument("--adapters", nargs="+", default=list(ADAPTERS), choices=list(ADAPTERS))
    parser.add_argument("--methods", nargs="+", default=list(RATES), choices=list(RATES))
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--inner-steps", type=int, default=7)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=160)
    parser.add_argument("--eval-rows", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="results/gauss_newton/finetune")
    arguments = parser.parse_args()
    settings = {name: getattr(arguments, name) for name in SETTINGS}
    for adapter in arguments.adapters:
        for method in arguments.methods:
            for rate in RATES[method]:
                path = os.path.join(arguments.output, f"{adapter}-{method}-{rate:g}.json")
                kept(path, settings, partial(run, arguments, adapter, method, rate))
                gc.collect()  # a Trainer and its model are freed by the collector only
    text = table(read_all(arguments.output))
    replace_file(os.path.join(arguments.output, "finetune.md"), text + "\n")
    print(text)


if __name__ == "__main__":
    main()
