"""Writing base model and adapter as one model, which needs neither PEFT nor this package."""

from __future__ import annotations

import copy
import os
import warnings
from dataclasses import dataclass

import torch
import transformers
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel

from ..config import ScaLoRAConfig
from ..files.atomic import new_folder, replace_file
from ..files.card import merged_card
from ..files.checkpoints import class_names
from ..files.checks import PREFIX
from ..layer import ScaLoRALayer
from ..model import embeddings_of
from ..quantized import dequantized
from ..rank import adapted_layers, change_factors
from .saved import read_adapter

# Of each task, the model class for every configuration class.
_CLASSES = {
    "CAUSAL_LM": transformers.MODEL_FOR_CAUSAL_LM_MAPPING,
    "SEQ_2_SEQ_LM": transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    "SEQ_CLS": transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    "TOKEN_CLS": transformers.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    "QUESTION_ANS": transformers.MODEL_FOR_QUESTION_ANSWERING_MAPPING,
    "FEATURE_EXTRACTION": transformers.MODEL_MAPPING,
}
# With a row for each label.
_HEADS = (".classifier.weight", ".score.weight", ".classifier.out_proj.weight", ".classification_head.out_proj.weight")

_LOAD_IT = "Load the base as it was trained, the adapter onto it, and call export_merged(model, path)."


@dataclass(frozen=True)
class MergeReport:
    """Report of `export_merged`: the folder written and its rounding error.

    Attributes:
        path: the folder.
        dtype: of the merged weights.
        relative_error: ‖written - (W + change)‖_F / ‖change‖_F over the adapted layers: the error of rounding to dtype,
            relative to what was learned. Above about 0.1, write a wider dtype.
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
    float32 and rounded once, to `dtype`.

    Args:
        model: a PeftModel of a transformers model, with no adapter merged.
        path: the folder to write; it must not exist, or be empty.
        adapter_name: the adapter to merge.
        dtype: of the weights written; None means that of the base.

    Returns:
        The folder, its dtype and size, and the error of rounding to that dtype.

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
    """Write the merged model of a saved adapter, with the tokenizer.

    Args:
        folder: of a saved ScaLoRA adapter.
        path: the folder to write; it must not exist, or be empty.
        base: a folder or an id on the hub; None means the model that the adapter says it was trained on.
        dtype: of the weights written; None means that of the base.

    Raises:
        ValueError: the adapter does not say what its base is, or base and adapter together are no whole model.
    """
    config, state = read_adapter(folder)
    base = base or config.base_model_name_or_path
    if not base:
        raise ValueError(f"adapter={folder!r} does not say which base model it was trained on: name it with base.")
    model = _load_base(base, config, state)
    names = class_names(folder)
    if names and len(names) == model.config.num_labels:
        model.config.id2label = dict(enumerate(names))
        model.config.label2id = {name: number for number, name in enumerate(names)}
    report = export_merged(_with_adapter(model, config, state), path, dtype=dtype)
    for source in (folder, base):
        if not os.path.isdir(source) or os.path.exists(os.path.join(source, "tokenizer_config.json")):
            AutoTokenizer.from_pretrained(source).save_pretrained(path)
            break
    return report


def _load_base(base: str, config: ScaLoRAConfig, state: dict[str, Tensor]) -> PreTrainedModel:
    """Load the adapter's base model, with the class, number of labels and vocabulary that the adapter has."""
    heads = [tensor for key, tensor in state.items() if key.endswith(_HEADS)]
    options = {"num_labels": len(heads[-1])} if heads else {}
    model, info = _base_class(config, base).from_pretrained(
        base, output_loading_info=True, ignore_mismatched_sizes=True, **options
    )
    fresh = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    fresh = sorted(name for name in fresh if _base_weight(name, state) is None)
    if fresh:
        raise ValueError(
            f"base={base!r}, loaded as {type(model).__name__}, has no weights for {fresh[:3]}, and neither has the "
            f"adapter: they would be random. {_LOAD_IT}"
        )
    _resize_embeddings(model, state)
    return model


def _with_adapter(base: PreTrainedModel, config: ScaLoRAConfig, state: dict[str, Tensor]) -> PeftModel:
    """Return the base with the adapter loaded; refuse tensors without a place in it and places without a tensor."""
    model = PeftModel(base, config)
    unexpected = set_peft_model_state_dict(model, state).unexpected_keys
    # PEFT saves trained embeddings, and what is tied to them, twice.
    twice = (".modules_to_save.", ".token_adapter.")
    unexpected = sorted(key for key in unexpected if not any(part in key for part in twice))
    missing = sorted(get_peft_model_state_dict(model, save_embedding_layers=False).keys() - state.keys())
    if missing or unexpected:
        raise ValueError(
            f"the adapter does not fit base={base.name_or_path!r}, loaded as {type(base).__name__}: the adapter lacks "
            f"{len(missing)} tensors {missing[:2]}, the model {len(unexpected)} {unexpected[:2]}. {_LOAD_IT}"
        )
    return model


def _resize_embeddings(model: PreTrainedModel, state: dict[str, Tensor]) -> None:
    """Give the model the vocabulary of the embeddings that the adapter brings, which fill it."""
    embeddings, head = embeddings_of(model)
    names = [name for name, module in model.named_modules() if module is embeddings or module is head]
    saved = {name: _base_weight(f"{name}.weight", state) for name in names}
    rows = {len(weight) for weight in saved.values() if weight is not None}
    if not rows or rows == {len(embeddings.weight)}:
        return
    absent = [name for name, weight in saved.items() if weight is None]
    if absent and head.weight is not embeddings.weight:
        raise ValueError(
            f"the adapter was trained with a vocabulary of {max(rows)} and has no weights for {absent}, which would be "
            f"random for the tokens that were added. {_LOAD_IT}"
        )
    model.resize_token_embeddings(max(rows), mean_resizing=False)


def _base_weight(name: str, state: dict[str, Tensor]) -> Tensor | None:
    """Return the tensor that an adapter's file has for a named parameter of the base model; None if it has none."""
    module, _, parameter = name.rpartition(".")
    keys = (f"{PREFIX}{module}.{part}{parameter}" for part in ("", "base_layer.", "token_adapter.base_layer."))
    return next((state[key] for key in keys if key in state), None)


def _base_class(config: ScaLoRAConfig, base: str) -> type[PreTrainedModel]:
    """Return the class for the adapter's task; without a task, the one that PEFT recorded or the base was saved as."""
    base_config = AutoConfig.from_pretrained(base)
    by_task = _CLASSES[config.task_type].get(type(base_config), None) if config.task_type in _CLASSES else None
    recorded = (config.auto_mapping or {}).get("base_model_class")
    names = [getattr(by_task, "__name__", None), recorded, *(base_config.architectures or ())]
    classes = [getattr(transformers, name, None) for name in names if name]
    return next((c for c in classes if isinstance(c, type) and issubclass(c, PreTrainedModel)), AutoModel)


def _check_mergeable(model: PeftModel, layers: dict, adapter_name: str) -> None:
    if not isinstance(model, PeftModel):
        raise ValueError(
            f"export_merged takes a PeftModel, not {type(model).__name__}: call model.save_pretrained(folder), then "
            "`peft-scalora export folder path --merged`."
        )
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
    """Return a merged copy in dtype, and the squared norm of the rounding to that dtype."""
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
        if is_parametrized(layer.get_base_layer(), "weight"):
            raise ValueError(
                f"{name}: the weight of its base layer is parametrized, so nothing can be merged into it. Call "
                "torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight') on it before adding the adapter."
            )
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
                f"{name}: a quantized {type(module).__name__} that replaces a layer that is not an nn.Linear cannot be "
                "merged."
            )
        linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
        linear.weight = nn.Parameter(values, requires_grad=False)
        linear.bias = module.bias
        base.set_submodule(name, linear)
    if getattr(base, "hf_quantizer", None) is not None:
        base.hf_quantizer.remove_quantization_config(base)
    return base


def _untie(base: PreTrainedModel, adapted: dict) -> None:
    """Give every module that shares the embeddings' weight one of its own, where any of them is adapted."""
    embeddings, _ = embeddings_of(base)
    shared = getattr(embeddings, "weight", None)
    if shared is None:
        return
    tied = {name: module for name, module in base.named_modules() if getattr(module, "weight", None) is shared}
    if len(tied) > 1 and any(layer.endswith(f".{name}") for layer in adapted for name in tied):
        for module in tied.values():
            module.weight = nn.Parameter(shared.detach().clone())
        base.config.tie_word_embeddings = False


def _norm2(P: torch.Tensor, Q: torch.Tensor) -> float:
    """Return ‖P Q‖_F², from the Gram matrices of P (out x k) and Q (k x in) in float64."""
    P, Q = P.double(), Q.double()
    return float(((P.T @ P) * (Q @ Q.T)).sum())
