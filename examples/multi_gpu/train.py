"""ScaLoRA on many GPUs: a script for plain LoRA with another configuration class. README.md has the launch lines.

accelerate launch --config_file examples/multi_gpu/fsdp2.yaml examples/multi_gpu/train.py --data train.jsonl
"""

from __future__ import annotations

import argparse

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from peft_scalora import ScaLoRAConfig, last_complete_checkpoint
from peft_scalora.finetuning.data import Fields, encode, find_fields, load_rows

CPU = not torch.cuda.is_available()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M", help="local folder or hub id")
    parser.add_argument("--data", default="openai/gsm8k:main", help="file or hub dataset")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--scaling-interval", type=int, default=10)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=4, help="on each GPU")
    parser.add_argument("--output", default="runs/multi_gpu")
    arguments = parser.parse_args()

    training = TrainingArguments(
        output_dir=arguments.output,
        per_device_train_batch_size=arguments.batch_size,
        gradient_accumulation_steps=2,
        max_steps=arguments.steps,
        learning_rate=1e-3,
        logging_steps=10,
        save_steps=50,
        bf16=not CPU,
        use_cpu=CPU,
        report_to="none",
    )
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    rows = load_rows(arguments.data)
    data = encode(rows, tokenizer, "causal-lm", find_fields(rows.column_names, "causal-lm", Fields()), 512)
    base = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32 if CPU else torch.bfloat16)
    config = ScaLoRAConfig(
        r=arguments.rank,
        lora_alpha=2 * arguments.rank,
        target_modules="all-linear",
        scaling_interval=arguments.scaling_interval,
        task_type="CAUSAL_LM",
    )
    trainer = Trainer(
        model=get_peft_model(base, config),
        args=training,
        train_dataset=data,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(arguments.output))
    trainer.save_model(arguments.output)


if __name__ == "__main__":
    main()
