"""Losses of 20 healthy training runs, to see that `detect_instability` raises no alarm on them.

GPT-2-, Llama- and BERT-type models from scratch, and LoRA and ScaLoRA adapters on a frozen random Llama, each at four
combinations of learning rate, batch size and seed that were chosen before anything was run. All text is generated.
Runs that are in the output file already are not repeated.

    python -m eval.studies.healthy_runs --output tests/healthy_runs.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import os

import torch
from peft import LoraConfig, get_peft_model
from tqdm import tqdm
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from eval.harness.corpus import byte_stream, windows
from eval.harness.record import read
from peft_scalora import ScaLoRAConfig
from peft_scalora.files.atomic import replace_file
from peft_scalora.finetuning.corpus import generate
from peft_scalora.stability import detect_instability

LENGTH = 48
VARIANTS = list(itertools.product((0.3, 1.0), (4, 8)))  # of the kind's learning rate, batch size; seeds are 0 to 3
RATES = {"gpt2": 3e-3, "llama": 3e-3, "bert": 5e-4, "lora": 5e-3, "scalora": 5e-3}


def make_model(kind: str):
    """Return a fresh model of one kind, over bytes."""
    size = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    if kind == "gpt2":
        config = GPT2Config(vocab_size=128, n_embd=64, n_layer=4, n_head=4, n_positions=LENGTH, bos_token_id=0)
        return GPT2LMHeadModel(config)
    if kind == "bert":
        return BertForSequenceClassification(BertConfig(intermediate_size=256, num_labels=2, **size))
    model = LlamaForCausalLM(LlamaConfig(intermediate_size=160, **size))
    if kind == "llama":
        return model
    config = {"lora": LoraConfig, "scalora": ScaLoRAConfig}[kind]
    return get_peft_model(model, config(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))


def batches(kind: str, batch: int, seed: int):
    """Yield batches without end: bytes of generated text; for BERT of single sentences, acceptable or not."""
    generator = torch.Generator().manual_seed(seed)
    if kind != "bert":
        data = byte_stream(5000, 0)
        while True:
            ids = windows(data, LENGTH, batch, generator)
            yield {"input_ids": ids, "labels": ids}
    rows = generate("train", 4000, 0)
    while True:
        chosen = [rows[i] for i in torch.randint(0, len(rows), (batch,), generator=generator)]
        ids = [list(row["sentence"].encode()[:LENGTH].ljust(LENGTH, b"\0")) for row in chosen]
        yield {"input_ids": torch.tensor(ids), "labels": torch.tensor([row["label"] for row in chosen])}


def train(kind: str, variant: int, steps: int) -> dict:
    """Train with 5% warmup and linear decay, AdamW, gradients clipped at 1, and return the losses."""
    share, batch = VARIANTS[variant]
    torch.manual_seed(variant)
    model = make_model(kind).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=share * RATES[kind])
    ramp = steps // 20
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min((s + 1) / ramp, (steps - s) / steps))
    losses = []
    for _, inputs in zip(range(steps), batches(kind, batch, variant)):
        loss = model(**inputs).loss
        losses.append(round(loss.item(), 4))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return {"name": run_name(kind, variant), "losses": losses}


def run_name(kind: str, variant: int) -> str:
    share, batch = VARIANTS[variant]
    return f"{kind}-lr{share * RATES[kind]:g}-batch{batch}-seed{variant}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--output", default="runs/healthy_runs.json")
    arguments = parser.parse_args()
    runs = []
    if os.path.exists(arguments.output):
        runs = read(arguments.output)["runs"]
    done = {run["name"] for run in runs}
    for kind, variant in tqdm([k for k in itertools.product(RATES, range(4)) if run_name(*k) not in done]):
        runs.append(train(kind, variant, arguments.steps))
        replace_file(arguments.output, json.dumps({"torch": torch.__version__, "runs": runs}) + "\n")
    for run in runs:
        first, last = (sum(part) / len(part) for part in (run["losses"][:10], run["losses"][-10:]))
        alarm = detect_instability(run["losses"]).events
        print(f"{run['name']}: {first:.3f} to {last:.3f}{f', ALARM {alarm}' if alarm else ''}")


if __name__ == "__main__":
    main()
