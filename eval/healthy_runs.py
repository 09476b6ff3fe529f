"""Losses of 20 healthy training runs, to see that `detect_instability` raises no alarm on them.

Small models from scratch, an adapter on a frozen random model, and MiniLM fine-tuned wholly and by LoRA, each at four
combinations of learning rate, batch size and seed that were chosen before anything was run. MiniLM comes from its
wheel unless a folder is given; all text is generated.

    python eval/healthy_runs.py --output tests/healthy_runs.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys

import torch
from long_run import byte_stream
from peft import LoraConfig, get_peft_model
from tqdm import tqdm
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from peft_scalora import ScaLoRAConfig
from peft_scalora.files import replace_file
from peft_scalora.stability import detect_instability

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "examples"))
from acceptability import generate
from quickstart import fetch_minilm

LENGTH = 48
VARIANTS = list(itertools.product((0.3, 1.0), (4, 8)))  # of the kind's learning rate, batch size; seeds are 0 to 3
RATES = {"gpt2": 3e-3, "llama": 3e-3, "scalora": 5e-3, "minilm": 1e-4, "minilm-lora": 1e-3}


def make_model(kind: str, minilm: str):
    """A fresh model of one kind."""
    if kind.startswith("minilm"):
        model = AutoModelForSequenceClassification.from_pretrained(minilm, num_labels=2)
        if kind == "minilm":
            return model
        return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS"))
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=128, n_embd=64, n_layer=4, n_head=4, n_positions=LENGTH))
    size = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=128, **size))
    if kind == "llama":
        return model
    return get_peft_model(model, ScaLoRAConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))


def batches(kind: str, batch: int, seed: int, minilm: str):
    """Batches without end: bytes of generated sentences, or acceptable and unacceptable ones with their labels."""
    generator = torch.Generator().manual_seed(seed)
    if not kind.startswith("minilm"):
        data = byte_stream(5000, 0)
        while True:
            starts = torch.randint(0, len(data) - LENGTH, (batch,), generator=generator)
            ids = torch.stack([data[start : start + LENGTH] for start in starts])
            yield {"input_ids": ids, "labels": ids}
    tokenizer, rows = AutoTokenizer.from_pretrained(minilm), generate("train", 4000, 0)
    while True:
        chosen = [rows[i] for i in torch.randint(0, len(rows), (batch,), generator=generator)]
        inputs = tokenizer([row["sentence"] for row in chosen], padding=True, return_tensors="pt")
        yield {**inputs, "labels": torch.tensor([row["label"] for row in chosen])}


def train(kind: str, variant: int, steps: int, minilm: str) -> dict:
    """One run with 5% warmup and linear decay, AdamW, gradients clipped at 1."""
    share, batch = VARIANTS[variant]
    torch.manual_seed(variant)
    model = make_model(kind, minilm).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=share * RATES[kind])
    ramp = steps // 20
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min((s + 1) / ramp, (steps - s) / steps))
    losses = []
    for _, inputs in zip(range(steps), batches(kind, batch, variant, minilm)):
        loss = model(**inputs).loss
        losses.append(round(loss.item(), 4))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return {"name": f"{kind}-lr{share * RATES[kind]:g}-batch{batch}-seed{variant}", "losses": losses}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of MiniLM; from its wheel unless given")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--output", default="runs/healthy_runs.json")
    arguments = parser.parse_args()
    minilm = arguments.model or fetch_minilm(".cache")
    runs = [
        train(kind, variant, arguments.steps, minilm)
        for kind, variant in tqdm(list(itertools.product(RATES, range(4))))
    ]
    replace_file(arguments.output, json.dumps({"torch": torch.__version__, "runs": runs}) + "\n")
    for run in runs:
        first, last = (sum(part) / len(part) for part in (run["losses"][:10], run["losses"][-10:]))
        alarm = detect_instability(run["losses"]).events
        print(f"{run['name']}: {first:.3f} to {last:.3f}{f', ALARM {alarm}' if alarm else ''}")


if __name__ == "__main__":
    main()
