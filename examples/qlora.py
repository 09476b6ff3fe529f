"""ScaLoRA on a quantized base model: load, train, save, load again, and write the result for serving.

    python examples/qlora.py --bits 4                                  # SmolLM2 and GSM8K, from the hub
    python examples/qlora.py --model FOLDER --data train.jsonl         # a local model, rows with "text" or "question"
    python examples/qlora.py --model FOLDER --generated                # a local model, and text made up here

At the end it prints what has to hold: the base is the same to the last bit, the rank is above r, and the saved adapter
computes what the trained one does.
"""

from __future__ import annotations

import argparse
import json
import os
import warnings

import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
)

from peft_scalora import ScaLoRACallback, ScaLoRAConfig, effective_rank, export_lora, export_merged
from peft_scalora.finetuning.corpus import generate
from peft_scalora.finetuning.data import Fields, encode, find_fields, load_rows

CPU = not torch.cuda.is_available()
DTYPE = torch.float32 if CPU else torch.bfloat16


def load_base(arguments: argparse.Namespace):
    """Load the base model in 4 or 8 bit, its other weights ready for training beside it."""
    if arguments.bits == 4:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=arguments.quant_type,
            bnb_4bit_use_double_quant=arguments.double_quant,
            bnb_4bit_compute_dtype=DTYPE,
        )
    else:
        quantization = BitsAndBytesConfig(load_in_8bit=True)
    base = AutoModelForCausalLM.from_pretrained(arguments.model, quantization_config=quantization, dtype=DTYPE)
    return prepare_model_for_kbit_training(base, use_gradient_checkpointing=not CPU)


def load_data(arguments: argparse.Namespace, tokenizer):
    if arguments.generated:
        rows = Dataset.from_list([{"text": row["sentence"]} for row in generate("train", 2000, arguments.seed)])
    else:
        rows = load_rows(arguments.data)
    fields = find_fields(rows.column_names, "causal-lm", Fields())
    return encode(rows, tokenizer, "causal-lm", fields, arguments.max_length)


def base_tensors(model) -> dict[str, torch.Tensor]:
    """Return copies of all tensors but the adapter's, with the scales of quantized weights."""
    state = model.state_dict()
    return {name: t.clone() for name, t in state.items() if "lora_" not in name and isinstance(t, torch.Tensor)}


def parse() -> argparse.Namespace:
    """Return what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M", help="local folder or hub id")
    parser.add_argument("--data", default="openai/gsm8k:main", help="file or hub dataset")
    parser.add_argument("--generated", action="store_true", help="train on text made up here instead of --data")
    parser.add_argument("--bits", type=int, choices=(4, 8), default=4)
    parser.add_argument("--quant-type", choices=("nf4", "fp4"), default="nf4")
    parser.add_argument("--double-quant", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--scaling", default="shrink", help="column folds more in a short run")
    parser.add_argument("--scaling-interval", type=int, default=5)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="runs/qlora")
    return parser.parse_args()


def make_trainer(arguments: argparse.Namespace) -> Trainer:
    """Return a Trainer of a ScaLoRA adapter on the quantized base."""
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    config = ScaLoRAConfig(
        r=arguments.r,
        lora_alpha=2 * arguments.r,
        target_modules="all-linear",
        scaling=arguments.scaling,
        scaling_interval=arguments.scaling_interval,
        task_type="CAUSAL_LM",
    )
    trainer = Trainer(
        model=get_peft_model(load_base(arguments), config),
        args=TrainingArguments(
            output_dir=arguments.output,
            per_device_train_batch_size=arguments.batch_size,
            max_steps=arguments.steps,
            learning_rate=arguments.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=0.1,
            logging_steps=10,
            bf16=not CPU,
            use_cpu=CPU,
            seed=arguments.seed,
            report_to="none",
        ),
        train_dataset=load_data(arguments, tokenizer),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )
    trainer.add_callback(ScaLoRACallback(trainer))
    return trainer


def difference_after_loading(trainer: Trainer, arguments: argparse.Namespace) -> float:
    """Save the adapter, load it onto a new base, and return the largest difference of a logit."""
    adapter = os.path.join(arguments.output, "adapter")
    trainer.save_model(adapter)
    loaded = PeftModel.from_pretrained(load_base(arguments), adapter).eval()
    rows = [trainer.train_dataset[i] for i in range(4)]
    batch = {name: t.to(trainer.model.device) for name, t in trainer.data_collator(rows).items()}
    with torch.no_grad():
        return float((loaded(**batch).logits - trainer.model(**batch).logits).abs().max())


def cost_of_merging_in_place(model: PeftModel) -> str:
    """Merge into the quantized base, which rounds the sum again, and return what the warning says of it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.merge_and_unload()
    message = next(str(warning.message) for warning in caught if "quantized" in str(warning.message))
    return message.partition(". ")[0]


def main() -> None:
    arguments = parse()
    torch.manual_seed(arguments.seed)
    trainer = make_trainer(arguments)
    model = trainer.model
    before = base_tensors(model)
    trainer.train()

    model.eval()
    after = base_tensors(model)
    ranks = effective_rank(model)
    apart = difference_after_loading(trainer, arguments)
    plain = export_lora(model, os.path.join(arguments.output, "plain_lora"))
    merged = export_merged(model, os.path.join(arguments.output, "merged"), dtype=torch.bfloat16)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    figures = {
        "first and last loss": [losses[0], losses[-1]],
        "mean effective rank": sum(ranks.values()) / len(ranks),
        "layers of rank above 2 r": f"{sum(rank > 2 * arguments.r for rank in ranks.values())} of {len(ranks)}",
        "base unchanged": before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before),
        "largest difference of a logit after saving and loading": apart,
        "plain LoRA": {"rank": plain.rank, "vLLM --max-lora-rank": plain.max_lora_rank},
        "merged, unquantized": {"dtype": str(merged.dtype), "relative error": merged.relative_error},
        "merged in place": cost_of_merging_in_place(model),
    }
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
