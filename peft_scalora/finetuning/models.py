"""The base model of a run and its adapter."""

from __future__ import annotations

import os

import torch
from peft import (
    LoraConfig,
    PeftConfig,
    get_peft_model,
    load_peft_weights,
    prepare_model_for_kbit_training,
    set_peft_model_state_dict,
)
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND as ALL_LINEAR
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    PreTrainedModel,
)

from .._seams import SEQ_CLS_HEAD_NAMES
from ..config import ScaLoRAConfig
from . import prompts
from .settings import CAUSAL_LM, FinetuneSettings

# What an adapter's weights depend on; the rest of its configuration is the new run's.
_SHAPE_FIELDS = ("r", "lora_alpha", "target_modules", "use_rslora", "rank_pattern", "alpha_pattern", "bias")


def load_tokenizer(settings: FinetuneSettings):
    """Return the model's tokenizer, with the chat template that was asked for."""
    tokenizer = prompts.load_tokenizer(settings.model)
    if settings.chat_template:
        with open(settings.chat_template, encoding="utf-8") as file:
            tokenizer.chat_template = file.read()
    return tokenizer


def load_base(settings: FinetuneSettings, classes: list | None) -> tuple[PreTrainedModel, set[str]]:
    """Return the base model and the names of the weights that its files lack."""
    options = {"dtype": weights_dtype(settings)}
    if settings.load_in_4bit:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=options["dtype"],
            llm_int8_skip_modules=[*SEQ_CLS_HEAD_NAMES, "lm_head"],
        )
    if settings.task == CAUSAL_LM:
        auto = AutoModelForCausalLM
    elif classes is None:
        auto = AutoModelForSequenceClassification
        options["num_labels"] = 1
    else:
        auto = AutoModelForSequenceClassification
        names = [str(value) for value in classes]
        options["id2label"] = dict(enumerate(names))
        options["label2id"] = {name: number for number, name in enumerate(names)}
    model, loading = auto.from_pretrained(settings.model, output_loading_info=True, **options)
    if settings.load_in_4bit:
        model = prepare_model_for_kbit_training(model, settings.gradient_checkpointing)
    return model, loading["missing_keys"]


def weights_dtype(settings: FinetuneSettings) -> torch.dtype:
    """Return the type that base weights are loaded in; arithmetic in bfloat16 goes with weights in bfloat16."""
    on_gpu = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    if settings.bf16 or settings.dtype == "bfloat16" or (settings.dtype == "auto" and on_gpu):
        return torch.bfloat16
    return torch.float32


def adapted_model(settings: FinetuneSettings, classes: list | None):
    """Return the base model with a fresh adapter, or with that of `start_from`.

    Raises:
        ValueError: the model lacks a target, or weights that cannot be saved with the adapter; `start_from` is no LoRA
            adapter for this model.
    """
    model, missing_keys = load_base(settings, classes)
    names = [name for name, _ in model.named_modules() if name]
    for target in target_names(settings):
        if not any(f".{name}".endswith(f".{target}") for name in names):
            raise ValueError(
                f"target_modules={settings.target_modules!r}: {settings.model!r} has no module named {target}. Name "
                f"modules it has, comma-separated, or {ALL_LINEAR}."
            )
    fresh = _fresh_modules(model, missing_keys, settings.model)
    # PEFT saves these heads by itself, with every module whose name ends so, and would adapt the latter besides.
    heads = SEQ_CLS_HEAD_NAMES if settings.task != CAUSAL_LM else []
    whole = fresh | {name for name in names if name.endswith(tuple(heads))}
    outermost = {name for name in whole if not any(name.startswith(f"{other}.") for other in whole)}
    config = adapter_config(settings, sorted(outermost - set(heads)) or None)
    if not settings.start_from:
        return _with_float32_training(get_peft_model(model, config))
    return _with_float32_training(_started_model(model, config, settings.start_from))


def adapter_config(settings: FinetuneSettings, modules_to_save: list[str] | None = None) -> LoraConfig:
    """Return the PEFT configuration of the run's method; LoRA and ScaLoRA get the same fields."""
    shared = {
        "r": settings.r,
        "lora_alpha": settings.lora_alpha,
        "lora_dropout": settings.lora_dropout,
        "target_modules": target_names(settings) or ALL_LINEAR,
        "modules_to_save": modules_to_save,
        "task_type": "CAUSAL_LM" if settings.task == CAUSAL_LM else "SEQ_CLS",
    }
    if settings.start_from:
        there = read_adapter_config(settings.start_from)
        shared |= {name: getattr(there, name) for name in _SHAPE_FIELDS}
    if settings.method == "lora":
        return LoraConfig(**shared)
    return ScaLoRAConfig(
        **shared,
        scaling=settings.scaling,
        scaling_interval=settings.scaling_interval,
        smoothness=settings.smoothness,
        accumulator_rank=settings.accumulator_rank or "auto",
    )


def read_adapter_config(folder: str) -> LoraConfig:
    """Return the configuration of an adapter folder.

    Raises:
        ValueError: it holds none, or one of another method.
    """
    try:
        config = PeftConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"start_from={folder!r} holds no adapter: {' '.join(str(error).split())}") from error
    if not isinstance(config, LoraConfig):
        raise ValueError(f"start_from={folder!r} holds an adapter of {config.peft_type}, not of LoRA or ScaLoRA.")
    return config


def target_names(settings: FinetuneSettings) -> list[str]:
    """Return the names of the target modules; empty for all linear modules."""
    if settings.target_modules == ALL_LINEAR:
        return []
    return [name.strip() for name in settings.target_modules.split(",")]


def _started_model(model: PreTrainedModel, config: LoraConfig, folder: str):
    there = read_adapter_config(folder)
    if isinstance(there, ScaLoRAConfig) and not isinstance(config, ScaLoRAConfig):
        raise ValueError(
            f"start_from={folder!r} is a ScaLoRA adapter, which method='lora' cannot hold: export it first."
        )
    if there.use_dora:
        raise ValueError(f"start_from={folder!r} is a DoRA adapter, which has more than the factors of LoRA.")
    if isinstance(there, ScaLoRAConfig):
        config.accumulator_rank = there.accumulator_rank
    state = load_peft_weights(folder, device="cpu")
    adapted = get_peft_model(model, config)
    result = set_peft_model_state_dict(adapted, state)
    adapter_keys = {key for key in adapted.state_dict() if "lora_" in key and ".scalora_" not in key}
    missing = sorted(adapter_keys & set(result.missing_keys))
    if missing or result.unexpected_keys:
        named = ", ".join((missing + list(result.unexpected_keys))[:3])
        raise ValueError(f"start_from={folder!r} does not fit the model, as {named} shows: choose one made for it.")
    return adapted


def _with_float32_training(model):
    """Return the model with what is trained in float32: small updates are lost in bfloat16."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def _fresh_modules(model: PreTrainedModel, missing_keys: set[str], source: str) -> set[str]:
    """Return modules that the base model's files lack: random at every load, so they are trained and saved whole."""
    fresh = {name.rpartition(".")[0] for name, _ in model.named_parameters() if name in missing_keys}
    for name in fresh:
        if any(True for _ in model.get_submodule(name).children()):
            raise ValueError(
                f"model={source!r} lacks a weight of {name or type(model).__name__}, which would be random at every "
                "load and cannot be saved with the adapter: complete the model first."
            )
    return fresh


def trainable_parameters(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def adapter_bytes(folder: str) -> int:
    return os.path.getsize(os.path.join(folder, "adapter_model.safetensors"))
