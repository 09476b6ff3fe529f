"""Making a transformer smaller by taking layers, neurons, heads or hidden features out of its weights.

Everything works on (configuration, state dict), and `rebuilt` makes the smaller model of them. As much is taken out of
every layer, so that the result is an ordinary configuration (heads of BERT apart) and loads without this package.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

State = dict[str, Tensor]


@dataclass(frozen=True)
class Layout:
    """Where the parts of an architecture are: names of nn.Linear modules below layer i of `layers`."""

    layers: str
    query: str
    key_value: tuple[str, str]
    attention_out: str
    mlp_in: tuple[str, ...]
    mlp_out: str
    hidden_out: tuple[str, ...] = ()  # others that write hidden features

    def writes_hidden(self, name: str) -> bool:
        return name.endswith((self.attention_out, self.mlp_out, *self.hidden_out))

    def reads_hidden(self, name: str) -> bool:
        return not name.endswith((self.attention_out, self.mlp_out))


LAYOUTS = {
    "bert": Layout(
        "bert.encoder.layer",
        "attention.self.query",
        ("attention.self.key", "attention.self.value"),
        "attention.output.dense",
        ("intermediate.dense",),
        "output.dense",
        ("pooler.dense",),
    ),
    "llama": Layout(
        "model.layers",
        "self_attn.q_proj",
        ("self_attn.k_proj", "self_attn.v_proj"),
        "self_attn.o_proj",
        ("mlp.gate_proj", "mlp.up_proj"),
        "mlp.down_proj",
    ),
}


def misfit(model: PreTrainedModel) -> str | None:
    """Return why nothing can be taken out of `model`; None if it can."""
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    return None if kind in LAYOUTS else f"layers of {kind!r} are not known (known: {', '.join(LAYOUTS)})"


def layout_of(model: PreTrainedModel) -> Layout:
    return LAYOUTS[model.config.model_type]


def kept_count(size: int, amount: float) -> int:
    """Return how many of `size` units stay when `amount` of them go: a multiple of 64 where `size` is."""
    step = math.gcd(64, size) if size >= 256 else 1
    return max(1, round(size * (1 - amount) / step)) * step


def strongest(scores: Tensor, count: int) -> Tensor:
    """Return the indices of the `count` largest scores, in ascending order."""
    return scores.topk(count).indices.sort().values


# importance, from the weights


def neuron_importance(state: State, layout: Layout, layer: int) -> Tensor:
    """Return ‖what a neuron reads‖ · ‖what it writes‖, shape (neurons,)."""
    prefix = f"{layout.layers}.{layer}."
    reads = sum(_weight(state, prefix, name).square().sum(1) for name in layout.mlp_in).sqrt()
    return reads * _weight(state, prefix, layout.mlp_out).norm(dim=0)


def head_importance(state: State, layout: Layout, layer: int, groups: int) -> Tensor:
    """Return ‖value‖ · ‖output‖ of every head, or group of heads that share keys and values, shape (groups,)."""
    prefix = f"{layout.layers}.{layer}."
    value = _weight(state, prefix, layout.key_value[1]).reshape(groups, -1)
    output = _weight(state, prefix, layout.attention_out)
    return value.norm(dim=1) * output.T.reshape(groups, -1).norm(dim=1)


def hidden_importance(state: State, layout: Layout) -> Tensor:
    """Return the norm of all weights that write a hidden feature, shape (hidden,)."""
    layers = {name: w for name, w in state.items() if name.startswith(layout.layers) and w.dim() == 2}
    written = [w.float() for name, w in layers.items() if layout.writes_hidden(name.removesuffix(".weight"))]
    return sum(w.square().sum(1) for w in written).sqrt()


def _weight(state: State, prefix: str, name: str) -> Tensor:
    return state[f"{prefix}{name}.weight"].float()


# zeroing, which leaves the shapes


def read_columns(model: PreTrainedModel, part: str, amount: float) -> dict[str, Tensor]:
    """Return which columns of the weight that reads `part` stay: module name -> boolean (columns,)."""
    layout, state = layout_of(model), model.state_dict()
    masks = {}
    for layer in range(model.config.num_hidden_layers):
        if part == "neurons":
            scores, out = neuron_importance(state, layout, layer), layout.mlp_out
        else:
            scores, out = head_importance(state, layout, layer, head_groups(model.config)), layout.attention_out
        name = f"{layout.layers}.{layer}.{out}"
        stay = torch.zeros(len(scores), dtype=torch.bool)
        stay[strongest(scores, kept_count(len(scores), amount))] = True
        masks[name] = stay.repeat_interleave(model.get_submodule(name).in_features // len(scores))
    return masks


# taking out


def without_zero_columns(model: PreTrainedModel, part: str) -> PreTrainedModel:
    """Return the model without the neurons, or heads, that nothing reads: the same function, smaller matrices."""
    layout, config, state = layout_of(model), copy.deepcopy(model.config), dict(model.state_dict())
    for layer in range(config.num_hidden_layers):
        prefix = f"{layout.layers}.{layer}."
        out = layout.mlp_out if part == "neurons" else layout.attention_out
        used = _weight(state, prefix, out).ne(0).any(0)
        if part == "neurons":
            index = used.nonzero()[:, 0]
            _take(state, prefix, layout.mlp_in, index, dim=0)
            _take(state, prefix, [layout.mlp_out], index, dim=1)
        else:
            index = keep_heads(state, layout, prefix, used, model.config)
    if part == "neurons":
        config.intermediate_size = len(index)
    else:
        set_heads(config, len(index))
    return rebuilt(model, config, state)


def keep_heads(state: State, layout: Layout, prefix: str, used: Tensor, config: PretrainedConfig) -> Tensor:
    """Take out the groups of heads whose columns are not `used` in one layer; the groups that stay."""
    groups = used.reshape(head_groups(config), -1).any(1).nonzero()[:, 0]
    rows, size = {}, {}
    for name in (layout.query, *layout.key_value):
        size[name] = _weight(state, prefix, name).shape[0] // head_groups(config)
        rows[name] = (groups[:, None] * size[name] + torch.arange(size[name])).flatten()
        _take(state, prefix, [name], rows[name], dim=0)
    _take(state, prefix, [layout.attention_out], rows[layout.query], dim=1)
    return groups


def keep_layers(model: PreTrainedModel, kept: Sequence[int]) -> PreTrainedModel:
    """Return the model with the layers `kept`, in this order."""
    layers, config = layout_of(model).layers, copy.deepcopy(model.config)
    state = {name: w for name, w in model.state_dict().items() if not name.startswith(f"{layers}.")}
    for new, old in enumerate(kept):
        prefix = f"{layers}.{old}."
        state |= {
            f"{layers}.{new}.{name.removeprefix(prefix)}": w
            for name, w in model.state_dict().items()
            if name.startswith(prefix)
        }
    config.num_hidden_layers = len(kept)
    return rebuilt(model, config, state)


def keep_hidden(model: PreTrainedModel, index: Tensor) -> PreTrainedModel:
    """Return the model with the hidden features `index` alone, and the attention's heads as they are.

    Raises:
        ValueError: BERT's heads have to be as wide together as its hidden features.
    """
    layout, config, state = layout_of(model), copy.deepcopy(model.config), dict(model.state_dict())
    for name, module in model.named_modules():
        own = {f"{name}.{part}" for part, _ in module.named_parameters(recurse=False)}
        for key in own & state.keys():
            weight = state[key]
            if not isinstance(module, nn.Linear):
                state[key] = weight.index_select(-1, index)  # embeddings and norms
                continue
            if layout.writes_hidden(name):
                weight = weight.index_select(0, index)
            if layout.reads_hidden(name) and weight.dim() == 2:
                weight = weight.index_select(1, index)
            state[key] = weight
    set_hidden(config, len(index))
    return rebuilt(model, config, state)


def _take(state: State, prefix: str, names: Sequence[str], index: Tensor, dim: int) -> None:
    for name in names:
        key = f"{prefix}{name}"
        state[f"{key}.weight"] = state[f"{key}.weight"].index_select(dim, index)
        if dim == 0 and f"{key}.bias" in state:
            state[f"{key}.bias"] = state[f"{key}.bias"].index_select(0, index)


# heads, and the model of a configuration


def head_groups(config: PretrainedConfig) -> int:
    """Return how many heads can go on their own: those with keys and values of their own."""
    return getattr(config, "num_key_value_heads", None) or getattr(config, "kept_heads", config.num_attention_heads)


def head_size(config: PretrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def set_heads(config: PretrainedConfig, groups: int) -> None:
    """Write the number of heads, or groups, that are left; BERT has no field for it, and gets `kept_heads`."""
    if hasattr(config, "num_key_value_heads"):
        config.head_dim = head_size(config)
        config.num_attention_heads = groups * (config.num_attention_heads // config.num_key_value_heads)
        config.num_key_value_heads = groups
    else:
        config.kept_heads = groups


def set_hidden(config: PretrainedConfig, hidden: int) -> None:
    if hasattr(config, "num_key_value_heads"):
        config.head_dim = head_size(config)
    else:
        width = head_groups(config) * head_size(config)
        if width != hidden:
            raise ValueError(f"hidden={hidden} features need heads of that width together, not {width}.")
        config.num_attention_heads = head_groups(config)
        config.__dict__.pop("kept_heads", None)
    config.hidden_size = hidden


def needs_own_loading(config: PretrainedConfig) -> bool:
    """Return whether heads are taken out of BERT, whose attention transformers makes as wide as its features."""
    return hasattr(config, "kept_heads")


def rebuilt(model: PreTrainedModel, config: PretrainedConfig, state: State) -> PreTrainedModel:
    """Return a model of the same class with `config` and exactly the weights of `state`."""
    return filled(construct(type(model), config), {name: w.clone() for name, w in state.items()})


def construct(cls: type[PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel:
    """Return a model without weights, which `filled` gives it, with as few heads as the configuration says."""
    with init_empty_weights(include_buffers=False):
        model = cls(config)
        if needs_own_loading(config):
            layout, width = layout_of(model), config.kept_heads * head_size(config)
            for layer in range(config.num_hidden_layers):
                prefix = f"{layout.layers}.{layer}."
                for name in (layout.query, *layout.key_value):
                    model.set_submodule(prefix + name, nn.Linear(config.hidden_size, width))
                model.set_submodule(prefix + layout.attention_out, nn.Linear(width, config.hidden_size))
    return model


def filled(model: PreTrainedModel, state: State) -> PreTrainedModel:
    """Give `model` the tensors of `state` themselves as its weights; of tied ones, one may be missing.

    Raises:
        ValueError: a weight is missing or unknown.
    """
    _, unknown = model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    missing = [name for name, p in model.named_parameters() if p.is_meta]
    if missing or unknown:
        raise ValueError(f"weights are missing ({', '.join(missing)}) or unknown ({', '.join(unknown)}).")
    return model.eval()
