"""eval/optimizing: what is taken out of a model, and distillation, against models that are masked and cut by hand."""

import copy
import math
import re

import numpy as np
import pytest
import torch
from helpers_models import KINDS, distance, tiny_bert, tiny_llama, tokens
from peft import get_peft_model_state_dict
from safetensors.numpy import load_file
from torch import nn

from eval.optimizing import distillation, pruning, shrink, structure
from eval.optimizing.common import count
from eval.optimizing.common import load as load_plain

MODELS = {"bert": tiny_bert, "llama": tiny_llama}
IN_DOUBLE = {"bert": 1e-12, "llama": 1e-5}  # whose norms compute in float32
both_models = pytest.mark.parametrize("kind", MODELS)


def double(kind, **options):
    torch.manual_seed(3)
    return MODELS[kind](**options).double().eval()


def logits(model):
    with torch.no_grad():
        return model(tokens()).logits


# taking out


@both_models
@pytest.mark.parametrize("part, amount", [("neurons", 0.4), ("heads", 0.5)])
def test_model_without_units_computes_what_the_masked_one_does(kind, part, amount):
    model = double(kind)
    masked, sliced = copy.deepcopy(model), pruning.prune_units(copy.deepcopy(model), part, amount)
    layout = shrink.LAYOUTS[kind]
    reader = layout.mlp_out if part == "neurons" else layout.attention_out
    units = 24 if part == "neurons" else 2  # of Llama's four heads, two share keys and values
    for i in range(2):
        layer = masked.get_submodule(f"{layout.layers}.{i}")
        stay = np.sort(np.argsort(importance_by_hand(layer, kind, part))[-round(units * (1 - amount)) :])
        features = layer.get_submodule(reader).in_features
        mask = torch.tensor(np.isin(np.arange(units), stay).repeat(features // units))
        layer.get_submodule(reader).register_forward_pre_hook(lambda _, x, m=mask: (x[0] * m,))
        assert sliced.get_submodule(f"{layout.layers}.{i}.{reader}").in_features == len(stay) * features // units
    assert distance(logits(sliced), logits(masked)) < IN_DOUBLE[kind]
    assert distance(logits(sliced), logits(model)) > 1e-3
    assert count(sliced)["parameters"] < count(model)["parameters"]


def importance_by_hand(layer, kind, part):
    """Norm of the weights into a unit times norm of those out of it, unit by unit."""
    weights = {name: p.detach().numpy() for name, p in layer.named_parameters()}
    if part == "neurons":
        names = {"bert": ("intermediate.dense", "output.dense"), "llama": ("mlp.gate_proj", "mlp.down_proj")}[kind]
        into = [weights[f"{names[0]}.weight"]] + ([weights["mlp.up_proj.weight"]] if kind == "llama" else [])
        out = weights[f"{names[1]}.weight"]
        return [
            math.sqrt(sum(float((w[i] ** 2).sum()) for w in into)) * np.linalg.norm(out[:, i])
            for i in range(len(out.T))
        ]
    names = {
        "bert": ("attention.self.value", "attention.output.dense"),
        "llama": ("self_attn.v_proj", "self_attn.o_proj"),
    }
    value, out = (weights[f"{name}.weight"] for name in names[kind])
    rows, columns = len(value) // 2, out.shape[1] // 2
    return [
        np.linalg.norm(value[i * rows : (i + 1) * rows]) * np.linalg.norm(out[:, i * columns : (i + 1) * columns])
        for i in range(2)
    ]


@both_models
def test_model_of_fewer_layers_runs_the_kept_ones(kind):
    model = double(kind) if kind == "bert" else double(kind, num_hidden_layers=4)
    kept = [1] if kind == "bert" else [0, 3]
    by_hand = copy.deepcopy(model)
    layers = by_hand.get_submodule(shrink.LAYOUTS[kind].layers)
    parent, name = by_hand.get_submodule(shrink.LAYOUTS[kind].layers.rpartition(".")[0]), "layer"
    setattr(parent, name if kind == "bert" else "layers", nn.ModuleList(layers[i] for i in kept))
    by_hand.config.num_hidden_layers = len(kept)
    by_hand.config.use_cache = False
    fewer = shrink.keep_layers(model, kept)
    assert fewer.config.num_hidden_layers == len(kept)
    assert torch.equal(logits(fewer), logits(by_hand))


def test_llama_without_features_that_nothing_writes_is_the_same_function():
    """A root mean square over fewer features is larger by a known factor, which the norms' weights can take back."""
    model, index, factor = double("llama"), torch.arange(0, 16, 2), 2.0
    dropped = torch.arange(1, 16, 2)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, dropped] = 0
        for layer in model.model.layers:
            for writer in (layer.self_attn.o_proj, layer.mlp.down_proj):
                writer.weight[dropped] = 0
    narrow = shrink.keep_hidden(model, index)
    for module in narrow.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.weight.data *= math.sqrt(factor)
            module.variance_epsilon *= factor
    assert narrow.config.hidden_size == 8
    assert distance(logits(narrow), logits(model)) < IN_DOUBLE["llama"]


@both_models
def test_narrow_model_is_an_ordinary_one(kind, tmp_path):
    narrow = structure.narrow(double(kind).float(), 0.5)
    narrow.save_pretrained(tmp_path)
    again = type(narrow).from_pretrained(tmp_path).eval()
    assert (again.config.hidden_size, again.config.intermediate_size) == (8, 12)
    assert torch.equal(logits(again), logits(narrow))


def test_bert_needs_heads_as_wide_as_its_features():
    with pytest.raises(ValueError, match="hidden=8 features need heads of that width together, not 16"):
        shrink.keep_hidden(double("bert"), torch.arange(8))


@both_models
def test_layers_that_change_nothing_are_dropped_first(kind):
    model = double(kind, num_hidden_layers=4) if kind == "llama" else double(kind)
    layer = model.get_submodule(f"{shrink.LAYOUTS[kind].layers}.0")
    if kind == "llama":
        for writer in (layer.self_attn.o_proj, layer.mlp.down_proj):
            nn.init.zeros_(writer.weight)
    batch = {"input_ids": tokens(), "attention_mask": torch.ones_like(tokens()), "labels": tokens()}
    kept = structure.influential_layers(model, batch, 0.25 if kind == "llama" else 0.5)
    assert kept == ([1, 2, 3] if kind == "llama" else [1])  # the last layer stays


def test_sizes_that_kernels_like():
    assert [shrink.kept_count(*pair) for pair in [(1536, 1 / 3), (1000, 0.4), (12, 1 / 3), (3, 0.99), (6, 0.5)]] == [
        1024,
        600,  # multiples of gcd(64, 1000) = 8
        8,
        1,
        3,
    ]


# zeros


def test_pruned_weights_are_the_smallest_and_counted_as_saved(tmp_path):
    model = tiny_bert()
    before = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    pruning.prune_weights(model, 0.7)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert count(load_plain(str(tmp_path))) == {
        "parameters": sum(w.size for w in saved.values()),
        "nonzeros": sum(np.count_nonzero(w) for w in saved.values()),
    }
    for name, was in before.items():
        if not re.search(r"(query|key|value|dense)\.weight", name):
            assert np.array_equal(saved[name], was)
            continue
        gone = saved[name] == 0
        assert gone.sum() == round(0.7 * gone.size)
        assert np.abs(was[gone]).max() <= np.abs(was[~gone]).min()
        assert np.array_equal(saved[name][~gone], was[~gone])


# counting


def test_parameters_are_the_base_the_factors_and_the_accumulator():
    base, model = KINDS["Linear"].filled(r=2, accumulator_rank=6)
    adapter = [t for name, t in get_peft_model_state_dict(model).items() if re.search(r"lora_[ABUV]\b", name)]
    sizes = [(18, 14), (10, 18)]  # of the adapted layers
    assert sum(t.numel() for t in adapter) == sum((2 + 6) * (m + n) for m, n in sizes)
    weights = [t.detach().numpy() for t in (*base.parameters(), *adapter)]
    assert count(model) == {
        "parameters": sum(w.size for w in weights),
        "nonzeros": sum(np.count_nonzero(w) for w in weights),
    }


# distillation


def test_distillation_loss_is_the_papers():
    rng = np.random.default_rng(0)
    student, teacher = rng.standard_normal((2, 5, 3))
    states, targets = rng.standard_normal((2, 3, 4, 6, 8))
    mask = rng.integers(0, 2, (4, 6))
    a, b, T, hard = distillation.SOFT, distillation.HIDDEN, distillation.TEMPERATURE, 0.8
    soft = 0.0
    for s, t in zip(student, teacher):
        p, q = (np.exp(x / T) / np.exp(x / T).sum() for x in (t, s))
        soft += sum(p[c] * math.log(p[c] / q[c]) for c in range(3)) / len(student)
    hidden = 0.0
    for S, H in zip(states, targets):
        pairs = [(S[i, j], H[i, j]) for i in range(4) for j in range(6) if mask[i, j]]
        hidden += sum(((s - h) ** 2).sum() for s, h in pairs) / sum((h**2).sum() for _, h in pairs) / len(states)
    expected = (1 - a) * hard + a * T**2 * soft + b * hidden
    numbers = [torch.tensor(x) for x in (np.float64(hard), student, teacher, states, targets, mask)]
    assert float(distillation.distillation_loss(*numbers)) == pytest.approx(expected, rel=1e-12)


def test_a_language_model_learns_the_logits_before_its_labels():
    labels = torch.tensor([[-100, -100, 7, 8], [-100, 5, -100, -100]])
    found = distillation.learned(torch.arange(8.0).reshape(2, 4, 1), labels)
    assert found[:, 0].tolist() == [1, 2, 4]
