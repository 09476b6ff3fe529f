"""Methods that PEFT has, and ScaLoRA, each with the number of trainable parameters that LoRA of rank r has."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from peft import (
    EvaConfig,
    FourierFTConfig,
    GraloraConfig,
    HiraConfig,
    LoraConfig,
    LoraGAConfig,
    RandLoraConfig,
    TaskType,
    get_peft_model,
    initialize_lora_eva_weights,
    prepare_model_for_kbit_training,
)
from peft.tuners.lora.eva import prepare_layer_inputs_fn_language_modeling
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.loraga import preprocess_loraga
from torch import nn

from peft_scalora import ScaLoRAConfig, effective_rank, register_optimizer
from peft_scalora.quantized import keep_as_loaded

from .shared import Prepared, common_fields, refuse_quantized, shared_fields, target_layers, task_type

FOURIER_SCALING = 150.0  # of the paper's GLUE runs, as PEFT states
RANDLORA_SCALING = 20  # randlora_alpha / rank of the bases, as PEFT advises


def lora(model, settings, batches, **options) -> Prepared:
    config = LoraConfig(**shared_fields(model, settings) | options)
    return Prepared(get_peft_model(model, config), effective_rank=effective_rank)


def wider_lora(factor: int, model, settings, batches) -> Prepared:
    """Prepare LoRA of `factor` times the rank with the same alpha / r."""
    return lora(model, replace(settings, r=factor * settings.r, lora_alpha=factor * settings.alpha), batches)


def rslora(model, settings, batches) -> Prepared:
    return lora(model, settings, batches, use_rslora=True)


def dora(model, settings, batches) -> Prepared:
    return replace(lora(model, settings, batches, use_dora=True), effective_rank=None)


def pissa(model, settings, batches) -> Prepared:
    """Prepare PiSSA (arXiv 2404.02948), by the fast SVD of 16 iterations."""
    refuse_quantized(model, settings, "its initialisation changes the weights")
    return replace(lora(model, settings, batches, init_lora_weights="pissa_niter_16"), effective_rank=None)


def lora_ga(model, settings, batches) -> Prepared:
    """Prepare LoRA-GA (arXiv 2407.05000), by the gradient of `batches`: PEFT's directions, the paper's scale."""
    refuse_quantized(model, settings, "its initialisation changes the weights")
    targets = list(target_layers(model, settings))  # the gradients are taken before PEFT resolves "all-linear"
    options = {"target_modules": targets, "init_lora_weights": "lora_ga", "lora_ga_config": LoraGAConfig()}
    config = LoraConfig(**shared_fields(model, settings) | options)

    def backward():
        for batch in batches:
            model(**_on_device(batch, model)).loss.backward()

    preprocess_loraga(model, config, backward)
    model = get_peft_model(model, config)
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            _rescale_lora_ga(layer, config.lora_ga_config.stable_gamma)
    return Prepared(model)


@torch.no_grad()
def _rescale_lora_ga(layer: LoraLayer, gamma: float) -> None:
    """Give B's columns and A's rows the norm m^(1/4) / sqrt(γ) (arXiv 2407.05000, Section 3.3), m outputs.

    PEFT multiplies B by the gradient's singular values too, and leaves A at norm 1: in a small model B is then nearly
    0, and depends on the scale of the loss.
    """
    weight, A, B = layer.get_base_layer().weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight
    before = layer.get_delta_weight("default").float()
    norm = len(B) ** 0.25 / gamma**0.5
    A.copy_(norm * torch.nn.functional.normalize(A.float(), dim=1))
    B.copy_(norm * torch.nn.functional.normalize(B.float(), dim=0))
    weight.copy_(weight.float() + before - layer.get_delta_weight("default").float())


def eva(model, settings, batches) -> Prepared:
    """Prepare EVA (arXiv 2410.07170), by the activations of `batches`; ranks are redistributed (rho = 2).

    Raises:
        ValueError: no batch has as many inputs of a layer as PEFT takes components of them, and so would wait for ever.
    """
    is_classifier = task_type(model) == TaskType.SEQ_CLS
    config = EvaConfig(use_label_mask=not is_classifier)  # a classifier's labels mask no position
    inputs = max(len(b["labels"]) if is_classifier else int((b["labels"] != -100).sum()) for b in batches)
    if inputs < config.rho * settings.r:
        raise ValueError(
            f"batch_size={settings.batch_size} gives method='eva' {inputs} rows of a classifier or answer tokens at a "
            f"time, and r={settings.r} needs {config.rho * settings.r:.0f}: choose a larger batch_size."
        )
    prepared = lora(model, settings, batches, init_lora_weights="eva", eva_config=config)
    initialize_lora_eva_weights(
        prepared.model,
        [_on_device(batch, model) for batch in batches],
        prepare_layer_inputs_fn=_layer_inputs,
        show_progress_bar=False,
    )
    # A layer whose rank has changed has new factors, of the base's type.
    for layer in prepared.model.modules():
        if isinstance(layer, LoraLayer):
            layer.lora_A.float()
            layer.lora_B.float()
    return prepared


def _layer_inputs(layer_input, positions: torch.Tensor, name: str) -> torch.Tensor:
    """Return PEFT's choice of the positions that are no padding, but all rows of what a classifier has pooled."""
    if layer_input[0].dim() == 2:
        return layer_input[0].contiguous()  # PEFT takes a view of it
    return prepare_layer_inputs_fn_language_modeling(layer_input, positions, name)


def _on_device(batch: dict, model: nn.Module) -> dict:
    device = next(model.parameters()).device
    return {name: tensor.to(device) for name, tensor in batch.items()}


def hira(model, settings, batches) -> Prepared:
    return Prepared(get_peft_model(model, HiraConfig(r=settings.r, **common_fields(model, settings))))


def gralora(model, settings, batches) -> Prepared:
    """Prepare GraLoRA (arXiv 2505.20355): 2 x 2 blocks of a layer, each with an adapter of rank r / 2.

    Raises:
        ValueError: r is odd.
    """
    if settings.r % 2:
        raise ValueError(f"r={settings.r} must be even: method='gralora' cuts a layer into 2 x 2 blocks.")
    config = GraloraConfig(r=settings.r, alpha=settings.alpha, gralora_k=2, **common_fields(model, settings))
    return Prepared(get_peft_model(model, config))


def lora_parameters(shapes: Iterable[tuple[int, int]], r: int) -> int:
    """Return the number of LoRA's parameters in layers of these shapes."""
    return sum(r * (m + n) for m, n in shapes)


def randlora_parameters(shapes: Iterable[tuple[int, int]], basis_rank: int) -> int:
    """Return RandLoRA's: each of ⌈min / b⌉ bases has b scales for one side and min(m, n) for the other."""
    return sum(-(-min(shape) // basis_rank) * (basis_rank + min(shape)) for shape in shapes)


def randlora(model, settings, batches) -> Prepared:
    """Prepare RandLoRA (arXiv 2502.00987), its bases of the rank that is closest to LoRA's number of parameters."""
    shapes = [tuple(layer.weight.shape) for layer in target_layers(model, settings).values()]
    budget = lora_parameters(shapes, settings.r)
    ranks = range(1, min(map(min, shapes)) + 1)
    rank = min(ranks, key=lambda basis_rank: abs(randlora_parameters(shapes, basis_rank) - budget))
    config = RandLoraConfig(r=rank, randlora_alpha=RANDLORA_SCALING * rank, **common_fields(model, settings))
    return Prepared(get_peft_model(model, config))


def fourierft(model, settings, batches) -> Prepared:
    """Prepare FourierFT (arXiv 2405.03003), with as many frequencies a layer as LoRA has parameters on average.

    Coefficients start at zero: with so many of them, the paper's N(0, 1) would be as large as a small model's weights.
    """
    shapes = [tuple(layer.weight.shape) for layer in target_layers(model, settings).values()]
    frequencies = min(lora_parameters(shapes, settings.r) // len(shapes), min(m * n for m, n in shapes))
    options = {"n_frequency": frequencies, "scaling": FOURIER_SCALING, "init_weights": True}
    return Prepared(get_peft_model(model, FourierFTConfig(**options, **common_fields(model, settings))))


class UncarriedAdamW(torch.optim.AdamW):
    """AdamW, the moments of which a rescaling leaves as they are."""


register_optimizer(UncarriedAdamW, {"exp_avg": 0, "exp_avg_sq": 0, "max_exp_avg_sq": 0})


def scalora(model, settings, batches) -> Prepared:
    config = ScaLoRAConfig(
        **shared_fields(model, settings),
        scaling=settings.scaling,
        scaling_interval=settings.scaling_interval,
        smoothness=settings.smoothness_constant,
        accumulator_rank=settings.accumulator_rank or "auto",
    )
    prepared = Prepared(get_peft_model(model, config), effective_rank=effective_rank)
    if not settings.moment_transport:
        # betas and eps are those of Trainer's AdamW, too.
        prepared.optimizer = UncarriedAdamW, {"lr": settings.learning_rate, "fused": True}
    return prepared


def _with_quantized_base(model, settings) -> nn.Module:
    """Make a base in 4 bit ready to be trained on.

    Raises:
        ValueError: the base is not in 4 bit.
    """
    if not getattr(model, "is_loaded_in_4bit", False):
        raise ValueError(
            f"method={settings.method!r} needs a base in 4 bit: load it with "
            "quantization_config=harness.models.quantization_config(method, dtype)."
        )
    for layer in model.modules():
        keep_as_loaded(layer)
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def _on_quantized(method: Callable, model, settings, batches) -> Prepared:
    """Prepare `method` on a quantized base, with autocast: PEFT has made norms and embeddings float32."""
    prepared = method(_with_quantized_base(model, settings), settings, batches)
    return replace(prepared, arguments={"bf16": settings.dtype == "bfloat16"})


def qlora(model, settings, batches) -> Prepared:
    return _on_quantized(lora, model, settings, batches)


def qscalora(model, settings, batches) -> Prepared:
    return _on_quantized(scalora, model, settings, batches)
