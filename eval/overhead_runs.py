"""Models of random weights with adapters of every method, to measure steps of."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from peft import HiraConfig, LoraConfig, PeftConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import peft_scalora
from peft_scalora import ScaLoRAConfig

# hidden size, MLP size, layers, heads, key-value heads, vocabulary
SHAPES = {
    "tiny": (64, 128, 2, 4, 2, 256),
    "smollm2-135m": (576, 1536, 30, 9, 3, 49152),
    "llama-3-8b": (4096, 14336, 32, 32, 8, 128256),
    "llama-3-8b-block": (4096, 14336, 1, 32, 8, 1024),
    "llama-3-70b-block": (8192, 28672, 1, 64, 8, 1024),
}
NEVER = 10**9


@dataclass(frozen=True)
class Method:
    """What a run trains: an adapter's configuration, AdamW in 8 bit or not, base weights of its own or shared ones."""

    config: PeftConfig
    in_8_bit: bool = False
    owns_base: bool = False


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


def methods(r: int, rank: int) -> dict[str, Method]:
    """Return every method by name; `rank` is R. ScaLoRA comes without and with a rescaling in every step."""
    shared = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    lora = {"lora_alpha": 2 * r, **shared}
    found = {"lora": Method(LoraConfig(r=r, **lora))}
    for accumulator in ("merged", "factored"):
        for name, interval in (("no rescaling", NEVER), ("rescaling", 1)):
            fields = {"accumulator": accumulator, "accumulator_rank": rank, "scaling_interval": interval}
            config = ScaLoRAConfig(r=r, **fields, **lora)
            # A merged weight is written to: it cannot be one that other methods use.
            found[f"{accumulator}, {name}"] = Method(config, owns_base=accumulator == "merged")
    found["lora r+R"] = Method(LoraConfig(r=r + rank, **lora))
    found["lora r+R, 8-bit Adam"] = Method(LoraConfig(r=r + rank, **lora), in_8_bit=True)
    found["dora"] = Method(LoraConfig(r=r, use_dora=True, **lora))
    found["hira"] = Method(HiraConfig(r=r, **shared))
    return found


def make_run(base, method: Method, ids: torch.Tensor) -> Run:
    """Return a model that shares the base weights unless it needs its own, with its accumulators filled."""
    memo = {} if method.owns_base else {id(p): p for p in base.parameters()}
    model = get_peft_model(copy.deepcopy(base, memo=memo), method.config)
    run = Run(model, make_optimizer([p for p in model.parameters() if p.requires_grad], method.in_8_bit))
    run.step(ids)
    if isinstance(method.config, ScaLoRAConfig):
        run.model(input_ids=ids, labels=ids).loss.backward()
        # One recompression, and one fold more, which a merged weight does not hold yet.
        for _ in range(method.config.accumulator_rank // method.config.r + 2):
            peft_scalora.rescale(run.model, run.optimizer)
        run.optimizer.zero_grad()
    return run


def make_optimizer(params: list[torch.nn.Parameter], in_8_bit: bool) -> torch.optim.Optimizer:
    """Return AdamW, or that of bitsandbytes with its state in 8 bit."""
    if not in_8_bit:
        return torch.optim.AdamW(params, lr=1e-4)
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(params, lr=1e-4, min_8bit_size=0)
