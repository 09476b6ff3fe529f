"""Measure what a bfloat16 base loses by holding the accumulated change itself.

    python -m eval.studies.merged_precision --data-dir D

A small language model of bytes, in bfloat16, is adapted to another text with accumulators merged into its weights and
with accumulators beside them, from the same seeds and batches. Held-out losses are compared seed by seed, beside the
spread that seeds alone make. The base model and the texts are those of `eval.studies.frontier`.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Sequence

import torch
from peft import PeftModel, get_peft_model
from torch import nn

from eval.studies.frontier_tasks import BaseModel, TextTask, base_model, load_texts
from peft_scalora import ScaLoRAConfig
from peft_scalora.files.tables import markdown
from peft_scalora.layer import ScaLoRALayer

FORMS = ("merged", "factored")


def train(base: nn.Module, task: TextTask, accumulator: str, seed: int, steps: int, learning_rate: float) -> PeftModel:
    """Return the base model with an adapter that was trained with one form of accumulator."""
    torch.manual_seed(seed)
    config = ScaLoRAConfig(r=4, lora_alpha=8, target_modules="all-linear", accumulator=accumulator)
    model = get_peft_model(copy.deepcopy(base), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        ids, labels = task.batch(generator)
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model


@torch.no_grad()
def held_out_loss(model: nn.Module, task: TextTask) -> float:
    """Return the mean loss of the held-out rows."""
    return statistics.mean(model(input_ids=ids, labels=ids).loss.item() for ids in task.rows_NT.split(64))


def merged_layers(model: nn.Module) -> str:
    """Return how many layers hold their change in the base weight, of how many."""
    layers = [module for module in model.modules() if isinstance(module, ScaLoRALayer)]
    return f"{sum(layer.merged_base is not None for layer in layers)} of {len(layers)}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    parser.add_argument("--data-dir", help="folder with gsm8k/ and math/; generated text unless given")
    parser.add_argument("--cache", default="runs/frontier", help="folder of pretrained base models")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    texts = load_texts(options.data_dir)
    task = TextTask(texts)
    base = base_model(BaseModel(), texts, options.cache).to(torch.bfloat16)
    rows = []
    losses = {form: [] for form in FORMS}
    for seed in range(options.seeds):
        models = [train(base, task, form, seed, options.steps, options.learning_rate) for form in FORMS]
        merged = merged_layers(models[0])
        for form, model in zip(FORMS, models):
            losses[form].append(held_out_loss(model, task))
        pair = [losses[form][-1] for form in FORMS]
        rows.append([str(seed), *(f"{loss:.4f}" for loss in pair), f"{pair[0] - pair[1]:+.4f}", merged])
    print(markdown(["seed", "merged", "factored", "difference", "layers that hold change"], rows))
    spread = " and ".join(f"{statistics.stdev(losses[form]):.4f}" for form in FORMS)
    print(f"\nstandard deviation over seeds, merged and factored: {spread}; untrained {held_out_loss(base, task):.4f}")


if __name__ == "__main__":
    main()
