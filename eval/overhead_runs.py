"""Models of random weights with adapters of every method, to measure steps of."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from peft import HiraConfig, LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import peft_scalora
from peft_scalora import ScaLoRAConfig

# hidden size, MLP size, layers, heads, key-value heads, vocabulary
SHAPES = {
    "tiny": (64, 128, 2, 4, 2, 256),
    "smollm2-135m": (576, 1536, 30, 9, 3, 49152),
    "llama-3-8b": (4096, 14336, 32, 32, 8, 128256),
    "llama-3-70b-block": (8192, 28672, 1, 64, 8, 1024),
}
NEVER = 10**9


@dataclass
class Run:
    """One method's model and optimizer."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer

    def step(self, ids: torch.Tensor) -> None:
        self.model(input_ids=ids, labels=ids).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def make_base(shape: tuple[int, ...], layers: int | None, dtype: torch.dtype, device: str, checkpointing: bool):
    """Return a Llama of random weights, of one of SHAPES."""
    hidden, mlp, depth, heads, kv_heads, vocabulary = shape
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers or depth,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(config).to(dtype)
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    return model


def configurations(r: int, rank: int) -> dict[str, LoraConfig]:
    """Return the configuration of every method by name; `rank` is R."""
    shared = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    lora = {"lora_alpha": 2 * r, **shared}
    return {
        "lora": LoraConfig(r=r, **lora),
        "scalora, no rescaling": ScaLoRAConfig(r=r, accumulator_rank=rank, scaling_interval=NEVER, **lora),
        "scalora, rescaling": ScaLoRAConfig(r=r, accumulator_rank=rank, scaling_interval=1, **lora),
        "lora r+R": LoraConfig(r=r + rank, **lora),
        "dora": LoraConfig(r=r, use_dora=True, **lora),
        "hira": HiraConfig(r=r, **shared),
    }


def make_run(base, config, ids: torch.Tensor) -> Run:
    """Return a model that shares the base weights, with its accumulators filled."""
    model = copy.deepcopy(base, memo={id(p): p for p in base.parameters()})
    model = get_peft_model(model, config)
    run = Run(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4))
    run.step(ids)
    if isinstance(config, ScaLoRAConfig):
        run.model(input_ids=ids, labels=ids).loss.backward()
        for _ in range(config.accumulator_rank // config.r + 1):
            peft_scalora.rescale(run.model, run.optimizer)
        run.optimizer.zero_grad()
    return run
