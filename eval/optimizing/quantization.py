"""Weights of fewer bits: bfloat16, torchao and bitsandbytes, with and without ScaLoRA on top.

torch.ao.quantization's eager mode is not used: it is deprecated in favour of torchao, and knows no 4-bit weights.
"""

from __future__ import annotations

import json
import os
from importlib.util import find_spec

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, BitsAndBytesConfig, PreTrainedModel, TorchAoConfig

from . import shrink
from .common import ADAPTER, BASE, Context, Row, heads, linear_names, load_adapter, save, save_adapter
from .common import load as load_plain

GROUP = 32  # weights that share a scale, where 4 bits are meant for groups
PACKED = "packed.safetensors"
_TOP = "the adapter stays apart from the quantized weights: merged, rounding would take it back"

ROWS = {
    "bfloat16": Row("one cast; fast where the CPU has AMX or AVX512-BF16", options={"kind": "bfloat16"}),
    "torchao-int8": Row(
        "weights alone; embeddings and head stay in bfloat16", options={"kind": "torchao", "config": "int8"}
    ),
    "torchao-int8-dynamic": Row(
        "activations are rounded too, token by token", options={"kind": "torchao", "config": "int8-dynamic"}
    ),
    "torchao-int4": Row(
        "a prototype in torchao, for CPUs alone, in the packing of the CPU it was made on", options={"kind": "int4"}
    ),
    "bnb-int8": Row("made for GPUs: on a CPU smaller, not faster", options={"kind": "bnb", "bits": 8}),
    "bnb-nf4": Row("made for GPUs: on a CPU smaller, not faster", options={"kind": "bnb", "bits": 4}),
    "torchao-int8+scalora": Row(_TOP, options={"kind": "torchao", "config": "int8", "scalora": True}),
    "bnb-int8+scalora": Row(_TOP, options={"kind": "bnb", "bits": 8, "scalora": True}),
    "bnb-nf4+scalora": Row(_TOP, options={"kind": "bnb", "bits": 4, "scalora": True}),
}


def misfit(row: Row, base: nn.Module) -> str | None:
    kind = row.options["kind"]
    package = {"bnb": "bitsandbytes", "torchao": "torchao", "int4": "torchao"}.get(kind)
    if package and find_spec(package) is None:
        return f"{package} is not installed: pip install '.[quantization]'"
    if kind != "bfloat16" and shrink.needs_own_loading(base.config):
        return "transformers cannot load a model with heads taken out, and quantizes while it loads"
    linears = [base.get_submodule(name) for name in inner_linears(base)]
    if not linears:
        return "it has no linear layer to quantize"
    if kind == "bnb" and row.options["bits"] == 4:
        return _nf4_misfit(linears)
    return _int4_misfit(linears) if kind == "int4" else None


def _nf4_misfit(linears: list[nn.Linear]) -> str | None:
    if torch.cuda.is_available():
        return None
    for name, multiple in {"out_features": 32, "in_features": 64}.items():
        sizes = {getattr(layer, name) for layer in linears if getattr(layer, name) % multiple}
        if sizes:
            return f"bitsandbytes' 4-bit kernel for CPUs needs {name} to be a multiple of {multiple}, not {min(sizes)}"
    return None


def _int4_misfit(linears: list[nn.Linear]) -> str | None:
    if torch.cuda.is_available():
        return "torchao's int4 packing here is for CPUs"
    sizes = {layer.in_features for layer in linears if layer.in_features % GROUP}
    if sizes:
        return f"torchao's int4 needs layers with a multiple of {GROUP} inputs, not {min(sizes)}"
    try:
        quantize_int4(nn.Sequential(nn.Linear(GROUP, 32, dtype=torch.bfloat16)), ["0"])(
            torch.zeros(1, GROUP, dtype=torch.bfloat16)
        )
    except (ImportError, RuntimeError, NotImplementedError) as error:
        return f"no int4 kernel for this CPU: {str(error).splitlines()[0]}"
    return None


def build(row: Row, context: Context, folder: str) -> nn.Module:
    model = quantized(row, context)
    if row.options["kind"] == "int4":
        save_packed(model, folder)
    elif "scalora" in row.options:
        save(model, os.path.join(folder, BASE))
        model = context.fine_tune(model, "scalora")
        save_adapter(model, folder)
    else:
        save(model, folder)
    return model


def quantized(row: Row, context: Context) -> PreTrainedModel:
    """Return the model that `row` starts from in its new type, loaded so: `to` would round buffers too."""
    base = context.folders[row.after]
    if row.options["kind"] in ("torchao", "bnb"):
        return load_plain(base, quantization_config=config_of(row, context.base(row)), dtype=torch.bfloat16)
    model = load_plain(base, dtype=torch.bfloat16)
    return quantize_int4(model, inner_linears(model)) if row.options["kind"] == "int4" else model


def inner_linears(model: PreTrainedModel) -> list[str]:
    """Return the names of all linear layers but the head."""
    return [name for name in linear_names(model) if name not in heads(model)]


def load(folder: str) -> nn.Module:
    if os.path.exists(os.path.join(folder, PACKED)):
        return load_packed(folder)
    if os.path.isdir(os.path.join(folder, ADAPTER)):
        return load_adapter(folder, load_plain(os.path.join(folder, BASE)))
    return load_plain(folder)


def config_of(row: Row, model: PreTrainedModel) -> TorchAoConfig | BitsAndBytesConfig:
    """Return what transformers takes as `quantization_config`; the head stays as it is."""
    if row.options["kind"] == "torchao":
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig

        kinds = {"int8": Int8WeightOnlyConfig, "int8-dynamic": Int8DynamicActivationInt8WeightConfig}
        return TorchAoConfig(kinds[row.options["config"]](), modules_to_not_convert=heads(model))
    bits = row.options["bits"]
    four = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.bfloat16}
    return BitsAndBytesConfig(
        load_in_8bit=bits == 8,
        load_in_4bit=bits == 4,
        llm_int8_skip_modules=heads(model),
        **(four if bits == 4 else {}),
    )


# torchao's int4 for CPUs, which neither transformers nor torchao's safetensors know


def quantize_int4(model: nn.Module, names: list[str]) -> nn.Module:
    """Quantize the linear layers `names` to 4 bits, in place."""
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import quantize_

    config = PrototypeInt4WeightOnlyConfig(group_size=GROUP, set_inductor_config=False)
    quantize_(model, config, filter_fn=lambda module, name: name in names)
    return model


def save_packed(model: PreTrainedModel, folder: str) -> None:
    """Write plain tensors: of a packed weight its two parts, and everything else as it is."""
    packed = [f"{name}.weight" for name in inner_linears(model)]
    tensors = {}
    for key, value in model.state_dict().items():
        if key in packed:
            tensors |= {f"{key}.qdata": value.qdata, f"{key}.scale_and_zero": value.scale_and_zero}
        elif not _is_tied(key, model):
            tensors[key] = value
    os.makedirs(folder, exist_ok=True)
    model.config.save_pretrained(folder)
    shapes = {key: list(model.get_parameter(key).shape) for key in packed}
    contiguous = {key: value.contiguous() for key, value in tensors.items()}
    save_file(contiguous, os.path.join(folder, PACKED), {"shapes": json.dumps(shapes)})


def load_packed(folder: str) -> PreTrainedModel:
    from torchao.prototype.quantization.int4 import Int4OpaqueTensor

    config = AutoConfig.from_pretrained(folder)
    model = shrink.construct(getattr(transformers, config.architectures[0]), config)
    with safe_open(os.path.join(folder, PACKED), "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        shapes = json.loads(file.metadata()["shapes"])
    for key, shape in shapes.items():
        parts = [tensors.pop(f"{key}.{part}") for part in ("qdata", "scale_and_zero")]
        weight = Int4OpaqueTensor(*parts, [1, GROUP], torch.Size(shape))
        module = model.get_submodule(key.removesuffix(".weight"))
        module.weight = nn.Parameter(weight, requires_grad=False)
    return shrink.filled(model, tensors)


def _is_tied(key: str, model: PreTrainedModel) -> bool:
    """Return whether `key` is the head's weight, and that the embeddings' too."""
    output = model.get_output_embeddings()
    tied = output is not None and output.weight is model.get_input_embeddings().weight
    return tied and model.get_submodule(key.rpartition(".")[0]) is output
