"""Writing base model and adapter as one model, which needs neither PEFT nor this package."""

from __future__ import annotations

import copy
import os
import warnings
from dataclasses import dataclass

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedModel,
)

from .card import merged_card
from .files import new_folder, replace_file
from .layer import ScaLoRALayer
from .quantized import dequantized
from .rank import adapted_layers, change_factors
from .saved import read_adapter

_AUTO = {
    "CAUSAL_LM": AutoModelForCausalLM,
    "SEQ_2_SEQ_LM": AutoModelForSeq2SeqLM,
    "SEQ_CLS": AutoModelForSequenceClassification,
    "TOKEN_CLS": AutoModelForTokenClassification,
}
_HEADS = ("classifier.weight", "score.weight", "out_proj.weight")


@dataclass(frozen=True)
class MergeReport:
    """What `export_merged` wrote.

    Attributes:
        path: the folder.
        dtype: of the merged weights.
        relative_error: ‖written - (W + change)‖_F / ‖change‖_F over the adapted layers: what rounding to dtype did to
            what was learned. Above about 0.1, write a wider dtype.
        size: bytes of the folder.
    """

    path: str
    dtype: torch.dtype
    relative_error: float
    size: int


def export_merged(
    model: PeftModel, path: str | os.PathLike, adapter_name: str = "default", dtype: torch.dtype | None = None
) -> MergeReport:
    """Write the base model with the adapter merged into it, as a transformers folder. `model` stays as it is.

    A quantized base is written unquantized, so that the change is not rounded to 4 or 8 bit. The sum is formed in
    float32 and rounded once, to `dtype` (None: that of the base).

    Raises:
        ValueError: there is no such adapter, an adapter is merged already, the base is no transformers model or
            cannot be dequantized. FileExistsError: path exists and is not an empty folder.
    """
    layers = adapted_layers(model, adapter_name)
    _check_mergeable(model, layers, adapter_name)
    dtype = dtype or model.get_base_model().dtype
    with new_folder(os.fspath(path)) as folder:
        merged, error2 = _merge(model, adapter_name, dtype)
        merged.save_pretrained(folder)
        change2 = sum(_norm2(*change_factors(layer, adapter_name)) for layer in layers.values())
        error = (error2 / change2) ** 0.5 if change2 else 0.0
        card = merged_card(model.peft_config[adapter_name], dtype, error)
        replace_file(os.path.join(folder, "README.md"), card)
        size = sum(entry.stat().st_size for entry in os.scandir(folder))
    return MergeReport(os.fspath(path), dtype, error, size)


def export_merged_folder(
    folder: str, path: str, base: str | None = None, dtype: torch.dtype | None = None
) -> MergeReport:
    """The same from a saved adapter folder, with the tokenizer; `base` is the model it was trained on unless given."""
    config, state = read_adapter(folder)
    base = base or config.base_model_name_or_path
    if not base:
        raise ValueError(f"adapter={folder!r} does not say which base model it was trained on: name it with base.")
    # A head that was trained with the adapter has as many rows as there are labels.
    heads = [tensor for key, tensor in state.items() if key.endswith(_HEADS)]
    options = {"num_labels": len(heads[-1])} if heads else {}
    model = _AUTO.get(config.task_type, AutoModel).from_pretrained(base, **options)
    report = export_merged(PeftModel.from_pretrained(model, folder), path, dtype=dtype)
    for source in (folder, base):
        if not os.path.isdir(source) or os.path.exists(os.path.join(source, "tokenizer_config.json")):
            AutoTokenizer.from_pretrained(source).save_pretrained(path)
            break
    return report


def _check_mergeable(model: PeftModel, layers: dict, adapter_name: str) -> None:
    if not any(isinstance(layer, ScaLoRALayer) for layer in layers.values()):
        raise ValueError(f"model has no ScaLoRA adapter adapter_name={adapter_name!r} to merge.")
    base = model.get_base_model()
    if not isinstance(base, PreTrainedModel):
        raise ValueError(
            f"export_merged writes transformers models, not {type(base).__name__}: call model.merge_and_unload() and "
            "save the result as you save the base."
        )
    merged = sorted({name for layer in layers.values() for name in layer.merged_adapters})
    if merged:
        raise ValueError(f"adapters {merged} are merged into the base: call model.unmerge_adapter() first.")


def _merge(model: PeftModel, adapter_name: str, dtype: torch.dtype) -> tuple[PreTrainedModel, float]:
    """A merged copy in dtype, and the squared norm of what rounding to it changed."""
    state = get_peft_model_state_dict(model, adapter_name=adapter_name)
    config = copy.deepcopy(model.peft_config[adapter_name])
    config.base_fingerprint = None  # a dequantized base has other values
    layers = adapted_layers(model, adapter_name)
    base = _unquantized(copy.deepcopy(model).unload())
    _untie(base, layers)
    plain = get_peft_model(base, config, adapter_name)
    set_peft_model_state_dict(plain, state, adapter_name)
    error2 = 0.0
    for name, layer in adapted_layers(plain, adapter_name).items():
        layer.scaling[adapter_name] = layers[name].scaling[adapter_name]  # which set_scale may have changed
        weights = layer.get_base_layer().float()
        layer.merge(safe_merge=True, adapter_names=[adapter_name])
        exact = [weight.clone() for weight in weights.parameters() if weight.dim() > 1]
        rounded = [weight for weight in weights.to(dtype).parameters() if weight.dim() > 1]
        error2 += sum(float((a - b.float()).square().sum()) for a, b in zip(exact, rounded))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="All adapters are already merged")
        merged = plain.merge_and_unload(adapter_names=[adapter_name])  # what is left: modules that were trained whole
    return merged.to(dtype), error2


def _unquantized(base: PreTrainedModel) -> PreTrainedModel:
    for name, module in list(base.named_modules()):
        values = dequantized(module)
        if values is None:
            continue
        if getattr(module, "source_cls", nn.Linear) is not nn.Linear or not hasattr(module, "in_features"):
            raise ValueError(
                f"{name}: a quantized {type(module).__name__} in the place of no nn.Linear cannot be merged."
            )
        linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
        linear.weight = nn.Parameter(values, requires_grad=False)
        linear.bias = module.bias
        base.set_submodule(name, linear)
    if getattr(base, "hf_quantizer", None) is not None:
        base.hf_quantizer.remove_quantization_config(base)
    return base


def _untie(base: PreTrainedModel, adapted: dict) -> None:
    """Give input and output embeddings weights of their own, where only one of the two is adapted."""
    head, embeddings = base.get_output_embeddings(), base.get_input_embeddings()
    if head is None or head.weight is not embeddings.weight:
        return
    names = [name for name, module in base.named_modules() if module is head or module is embeddings]
    if any(layer.endswith(f".{name}") for layer in adapted for name in names):
        head.weight = nn.Parameter(head.weight.detach().clone())
        base.config.tie_word_embeddings = False


def _norm2(P: torch.Tensor, Q: torch.Tensor) -> float:
    """‖P Q‖_F² through the Gram matrices."""
    P, Q = P.double(), Q.double()
    return float(((P.T @ P) * (Q @ Q.T)).sum())
