"""Gauss-Newton training of a LoRA or ScaLoRA adapter, or of a whole model, with an unmodified Trainer.

    python examples/gauss_newton.py                                     # a tiny model on generated text, a minute
    python examples/gauss_newton.py --model PATH_OR_ID --data rows.jsonl --method lora

All that differs from ordinary training is one callback. Each step of Trainer is one step of Gauss-Newton: `inner_steps`
of them move the change of the weights, the next one is the line search that commits it.
"""

from __future__ import annotations

import argparse

from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from peft_scalora import GaussNewtonCallback, GaussNewtonConfig, ScaLoRAConfig
from peft_scalora.finetuning.corpus import generate
from peft_scalora.finetuning.data import Fields, encode, find_fields, load_rows


def tiny_task():
    """Return a small Llama from scratch and windows of 64 bytes of generated sentences."""
    text = " ".join(row["sentence"] for row in generate("train", 4000, 0) if row["label"]).encode()
    windows = [list(text[start : start + 64]) for start in range(0, len(text) - 64, 64)]
    rows = Dataset.from_list([{"input_ids": window, "labels": window} for window in windows])
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=168,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=128,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config), rows, None


def your_task(arguments: argparse.Namespace):
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    rows = load_rows(arguments.data)
    fields = find_fields(rows.column_names, "causal-lm", Fields())
    rows = encode(rows, tokenizer, "causal-lm", fields, max_length=256)
    return AutoModelForCausalLM.from_pretrained(arguments.model), rows, DataCollatorForSeq2Seq(tokenizer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="local folder or hub id; a tiny model from scratch unless given")
    parser.add_argument("--data", help="rows for --model")
    parser.add_argument("--method", choices=("full", "lora", "scalora"), default="full")
    parser.add_argument("--variant", choices=("gn", "prox_linear"), default="prox_linear")
    parser.add_argument("--inner-steps", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=330, help="inner steps and line searches together")
    parser.add_argument("--output", default="runs/gauss_newton")
    arguments = parser.parse_args()
    if bool(arguments.model) != bool(arguments.data):
        parser.error("--model and --data go together")

    model, rows, collator = your_task(arguments) if arguments.model else tiny_task()
    if arguments.method != "full":
        config = {"lora": LoraConfig, "scalora": ScaLoRAConfig}[arguments.method]
        model = get_peft_model(model, config(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))

    parts = rows.train_test_split(test_size=min(200, len(rows) // 5), seed=0)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=arguments.output,
            learning_rate=arguments.learning_rate,
            lr_scheduler_type="constant",
            per_device_train_batch_size=arguments.batch_size,
            max_steps=arguments.steps,
            logging_steps=arguments.inner_steps + 1,
            eval_strategy="steps",
            eval_steps=arguments.inner_steps + 1,
            report_to="none",
        ),
        train_dataset=parts["train"],
        eval_dataset=parts["test"],
        data_collator=collator,
        callbacks=[
            GaussNewtonCallback(GaussNewtonConfig(variant=arguments.variant, inner_steps=arguments.inner_steps))
        ],
    )
    trainer.train()
    trainer.save_model()
    print(f"held-out loss {trainer.evaluate()['eval_loss']:.3f}; the model is in {arguments.output}")


if __name__ == "__main__":
    main()
