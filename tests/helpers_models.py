"""Tiny models of every kind of layer that PEFT adapts, adapters with a filled accumulator, and the dense oracle.

The oracle never runs a ScaLoRA layer: it reads the tensors that a saved adapter consists of, forms the explicit weight
W + s B A + U V in float64 and calls the unadapted base model with it.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn
from torch.func import functional_call
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.pytorch_utils import Conv1D

from peft_scalora import ScaLoRAConfig
from peft_scalora.layer import ScaLoRALayer

VOCABULARY = 40
SCALE = 1.5  # lora_alpha / r of scalora_config
every_accumulator = pytest.mark.parametrize("accumulator_rank", [5, 64], ids=["truncating", "lossless"])


class Linears(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin0 = nn.Linear(14, 18)
        self.lin1 = nn.Linear(18, 10)

    def forward(self, x):
        return self.lin1(torch.tanh(self.lin0(x)))


class TransposedLinears(nn.Module):
    """GPT-2's Conv1D keeps its weight as (in, out): fan_in_fan_out."""

    def __init__(self):
        super().__init__()
        self.lin0 = Conv1D(18, 14)
        self.lin1 = Conv1D(10, 18)
        for layer in (self.lin0, self.lin1):
            nn.init.normal_(layer.weight, std=0.3)

    def forward(self, x):
        return self.lin1(torch.tanh(self.lin0(x)))


class Embeddings(nn.Module):
    def __init__(self, **kwargs):
        super().__init__()
        self.emb = nn.Embedding(VOCABULARY, 12, **kwargs)
        self.head = nn.Linear(12, 6)

    def forward(self, x):
        return self.head(torch.tanh(self.emb(x)))


class Convolution(nn.Module):
    """One convolution with a stride, padding and a bias, and a second with another kernel."""

    def __init__(self, dimensions: int, groups: int = 1):
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
        self.conv0 = conv(6, 8, 3, stride=2, padding=1, groups=groups)
        self.conv1 = conv(8, 5, 2 if dimensions == 3 else 1)  # PEFT cannot merge a 1 x 1 x 1 kernel

    def forward(self, x):
        return self.conv1(torch.tanh(self.conv0(x))).flatten(1)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.mha = nn.MultiheadAttention(12, 2, batch_first=True)
        self.head = nn.Linear(12, 6)

    def forward(self, x):
        return self.head(self.mha(x, x, x)[0])


def tiny_gpt2() -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=32, initializer_range=0.2,
        attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, bos_token_id=0, eos_token_id=1, tie_word_embeddings=False,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def tiny_llama(**kwargs) -> LlamaForCausalLM:
    settings = {
        "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32, "initializer_range": 0.2,
        "bos_token_id": 0, "eos_token_id": 1, "tie_word_embeddings": False,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**settings | kwargs))


def tiny_bert() -> BertForSequenceClassification:
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=32, initializer_range=0.2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        num_labels=3,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def tokens(rows: int = 4, length: int = 7) -> Tensor:
    return torch.randint(2, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))


def floats(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@dataclass(frozen=True)
class Kind:
    """A model of one kind of layer: how to build it, what to adapt, what to feed it."""

    build: Callable[[], nn.Module]
    targets: list[str]
    inputs: Callable[[], Tensor]
    options: dict | None = None

    def config(self, **kwargs) -> ScaLoRAConfig:
        return scalora_config(**{"target_modules": self.targets} | (self.options or {}) | kwargs)

    def filled(self, **kwargs) -> tuple[nn.Module, PeftModel]:
        """The base model and a copy of it with an adapter whose accumulator is filled."""
        base = self.build().eval()
        return base, fill(get_peft_model(copy.deepcopy(base), self.config(**kwargs)), inputs=self.inputs())


KINDS = {
    "Linear": Kind(Linears, ["lin0", "lin1"], lambda: floats(5, 14)),
    "Conv1D": Kind(TransposedLinears, ["lin0", "lin1"], lambda: floats(5, 14), {"fan_in_fan_out": True}),
    "Embedding": Kind(Embeddings, ["emb"], tokens),
    "Conv1d": Kind(lambda: Convolution(1), ["conv0", "conv1"], lambda: floats(5, 6, 7)),
    "Conv2d": Kind(lambda: Convolution(2), ["conv0", "conv1"], lambda: floats(5, 6, 5, 4)),
    "Conv3d": Kind(lambda: Convolution(3), ["conv0", "conv1"], lambda: floats(5, 6, 3, 5, 4)),
    "MultiheadAttention": Kind(Attention, ["mha"], lambda: floats(5, 3, 12)),
    "GPT-2": Kind(tiny_gpt2, ["c_attn", "c_proj", "wte"], tokens, {"fan_in_fan_out": True}),
    "Llama": Kind(tiny_llama, ["q_proj", "v_proj", "down_proj", "embed_tokens", "lm_head"], tokens),
    "BERT": Kind(tiny_bert, ["query", "value", "word_embeddings"], tokens, {"modules_to_save": ["classifier"]}),
}
every_layer_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def scalora_config(**kwargs) -> ScaLoRAConfig:
    """Rank 2 with a scale that is not 1, rescaled at every step; an accumulator that the steps of `fill` overfill."""
    settings = {"r": 2, "lora_alpha": 3, "scaling": "column", "scaling_interval": 1, "accumulator_rank": 5}
    return ScaLoRAConfig(**settings | kwargs)


def output(model: nn.Module, *args, **kwargs) -> Tensor:
    """What the model computes, as one tensor."""
    result = model(*args, **kwargs)
    return result if isinstance(result, Tensor) else result.logits


def train(
    model: nn.Module, inputs: Tensor, steps: int, optimizer: torch.optim.Optimizer | None = None, seed: int = 2
) -> torch.optim.Optimizer:
    """Regression to a random target, another one at every step, so that the change has many directions."""
    if optimizer is None:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-2)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        result = output(model, inputs)
        (result - torch.randn(result.shape, generator=generator).to(result)).square().mean().backward()
        optimizer.step()
    optimizer.zero_grad()
    return optimizer


def fill(
    model: PeftModel, adapter: str = "default", inputs: Tensor | None = None, steps: int = 6, seed: int = 2
) -> PeftModel:
    """Train `adapter` for some steps with rescaling, so that its factors, U and V are far from zero.

    A fresh adapter has U = V = 0 and would pass any test of the accumulated state.
    """
    before = model.active_adapters[0]
    training = model.training
    model.set_adapter(adapter)
    train(model, floats(5, 14) if inputs is None else inputs, steps, seed=seed)
    model.set_adapter(before)
    model.train(training)
    check_filled(model, adapter)
    return model.eval()


def check_filled(model: nn.Module, adapter: str = "default") -> None:
    layers = [m for m in model.modules() if isinstance(m, ScaLoRALayer) and adapter in m.scalora_U]
    assert layers
    for layer in layers:
        factors = layer.factors(adapter)
        change = layer.scalora_U[adapter] @ layer.scalora_V[adapter]
        plain = layer.scaling[adapter] * factors[0].detach().flatten(1).float() @ factors[1].detach().flatten(1).float()
        assert plain.norm() > 1e-3, "the factors have to be part of the test"
        assert change.norm() > 1e-3, "the accumulated state has to be part of the test"


def scalora_layers(model: nn.Module) -> dict[str, ScaLoRALayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, ScaLoRALayer)}


def saved_tensors(model: PeftModel, adapter: str = "default") -> dict[str, dict[str, Tensor]]:
    """What a saved adapter holds: layer name in the base model -> {"lora_A": ..., "scalora_U": ...}, in float64."""
    layers: dict[str, dict[str, Tensor]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    for key, tensor in state.items():
        key = key.removeprefix("base_model.model.").removesuffix(".weight")
        layer, _, part = key.rpartition(".")
        if part.startswith(("lora_", "scalora_")) and part != "lora_magnitude_vector":
            layers.setdefault(layer.replace(".base_layer", ""), {})[part] = tensor.detach().double().clone()
    return layers


def change_of(tensors: dict[str, Tensor], scale: float) -> Tensor:
    """s B A + U V (out x in, a kernel flattened) of the tensors of one layer; differentiable."""
    B, A = (tensors.get(f"lora_{x}", tensors.get(f"lora_embedding_{x}")).flatten(1) for x in "BA")
    change = scale * B @ A
    if "scalora_U" not in tensors:
        return change
    return change + tensors["scalora_U"] @ tensors["scalora_V"]


def as_stored(change: Tensor, base: nn.Module, layer: str) -> tuple[str, Tensor]:
    """The name of the parameter of `base` that `layer` adapts, and the change in that parameter's layout."""
    module = base.get_submodule(layer)
    if isinstance(module, (Conv1D, nn.Embedding)):
        change = change.T
    name = "in_proj_weight" if isinstance(module, nn.MultiheadAttention) else "weight"
    return f"{layer}.{name}", change.reshape(getattr(module, name).shape)


def dense_weights(
    base: nn.Module, layers: dict[str, dict[str, Tensor]], scale: float | dict[str, float], factor: float = 1.0
) -> dict[str, Tensor]:
    """Explicit weights W + factor (s B A + U V) of every adapted layer; `scale` is s, or s by layer."""
    weights = {}
    for layer, tensors in layers.items():
        s = scale[layer] if isinstance(scale, dict) else scale
        name, change = as_stored(factor * change_of(tensors, s), base, layer)
        weights[name] = base.get_parameter(name).detach().double() + change
        if isinstance(base.get_submodule(layer.rpartition(".")[0]), nn.MultiheadAttention):
            weights[name] = weights[name] + (times_peft_adds_out_proj() - 1) * change.detach()
    return weights


@cache
def times_peft_adds_out_proj() -> int:
    """PEFT 0.21 merges plain LoRA's change of an attention's out_proj twice, the second time past autograd."""
    base = nn.Sequential(nn.MultiheadAttention(4, 1))
    model = get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=["0"], init_lora_weights=False))
    layer = model.base_model.model[0]
    layer.merge()
    added = layer.out_proj.weight - base[0].out_proj.weight
    return round(float((added.norm() / layer.base_layer.out_proj.get_delta_weight("default").norm()).detach()))


def in_double(base: nn.Module) -> nn.Module:
    return copy.deepcopy(base).double().eval()


def with_weights(base: nn.Module, weights: dict[str, Tensor], *args) -> Tensor:
    """The unadapted model in float64, called with explicit weights."""
    args = tuple(a.double() if a.is_floating_point() else a for a in args)
    # A weight that is tied to the adapted one keeps its value, as PEFT adapts the targeted module alone.
    result = functional_call(in_double(base), weights, args, tie_weights=False)
    return result if isinstance(result, Tensor) else result.logits


def oracle(base: nn.Module, model: PeftModel, *args, adapter: str = "default", scale: float = 1.5, factor: float = 1.0):
    """Output of the explicit dense model for one adapter; modules_to_save are taken from the adapted model."""
    weights = dense_weights(base, saved_tensors(model, adapter), scale, factor)
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "modules_to_save") and adapter in module.modules_to_save:
            for parameter, value in module.modules_to_save[adapter].named_parameters():
                weights[f"{name}.{parameter}"] = value.detach().double()
    return with_weights(base, weights, *args)


def distance(a: Tensor, b: Tensor) -> float:
    """Largest difference relative to the largest value."""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-30))


def factor_parameters(model, adapter="default"):
    """Layer name in the base model -> {"lora_A": parameter, "lora_B": parameter}, found by their public names."""
    found = {}
    for name, parameter in model.named_parameters():
        parts = name.removeprefix("base_model.model.").removesuffix(".weight").split(".")
        if parts[-1] == adapter and parts[-2].startswith("lora_"):
            layer = ".".join(part for part in parts[:-2] if part != "base_layer")
            found.setdefault(layer, {})[parts[-2]] = parameter
    return found


def grads_of(model):
    return {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}


def double(x):
    return x.double() if x.is_floating_point() else x
