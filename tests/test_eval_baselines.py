"""Every method of the evaluation: wired as its paper says, trained, and continued after an interruption."""

import math
import sys

import numpy as np
import pytest
import torch
from helpers_eval import base_model, collate, plain_model, rows, run, settings
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from transformers import set_seed

from eval.baselines import METHODS, prepare
from eval.baselines.peft_methods import UncarriedAdamW
from peft_scalora import rescale

every_method = pytest.mark.parametrize("method", METHODS)
every_kind = pytest.mark.parametrize("kind", ["bert", "llama"])
ALL_TRAINED = ("full", "galore")


def head_parameters(kind):
    return 3 * 16 + 3 if kind == "bert" else 0


def target_shapes(kind):
    """(out, in) of every linear layer of the tiny models but the heads, listed by hand."""
    if kind == "bert":
        return [(16, 16)] * 8 + [(24, 16), (16, 24)] * 2 + [(16, 16)]  # and the pooler
    return [(16, 16), (8, 16), (8, 16), (16, 16), (24, 16), (24, 16), (16, 24)] * 2


def prepared(kind, method, tmp_path=None, **kwargs):
    base = base_model(kind, method, tmp_path)
    set_seed(0)  # as in a run
    batches = [collate(rows(kind == "bert")[i : i + 4]) for i in range(0, 16, 4)]
    return prepare(base, settings(method, **kwargs), batches)


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@every_method
@every_kind
def test_a_run_changes_what_is_trainable_and_nothing_else(kind, method, tmp_path):
    initial = prepared(kind, method, tmp_path / "initial").model
    before = {name: p.detach().clone() for name, p in initial.named_parameters()}
    model, figures = run(kind, method, tmp_path)
    assert figures["steps"] == 3
    assert [step for step, _, _ in figures["losses"]] == [1, 2, 3]
    assert all(math.isfinite(loss) for _, _, loss in figures["losses"])
    assert figures["trainable_parameters"] == sum(p.numel() for p in trainable(model).values()) > 0
    after = model.state_dict()  # in which base weights are without the change that they hold while they are trained
    changed = {name for name in before if not torch.equal(after[name], before[name])}
    merged = {name for name in before if method == "relora" and name.endswith("base_layer.weight")}
    unused = {name for name in before if "position_embeddings" in name or "token_type" in name}
    assert changed - merged <= trainable(model).keys()
    assert trainable(model).keys() - changed <= (unused if method in ALL_TRAINED else set())
    assert merged <= changed


@every_method
def test_the_head_of_a_classifier_is_trained(method, tmp_path):
    names = trainable(prepared("bert", method, tmp_path).model)
    assert {name.rpartition(".")[2] for name in names if "classifier" in name} == {"weight", "bias"}


@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"qlora", "qscalora"}))
def test_what_is_trained_is_float32_whatever_the_base(method, tmp_path):
    base = plain_model("llama").bfloat16()
    model, figures = run("llama", method, tmp_path, model=base, dtype="bfloat16")
    assert {p.dtype for p in trainable(model).values()} == {torch.float32}
    assert all(math.isfinite(loss) for _, _, loss in figures["losses"])


LIKE_LORA = ("lora", "rslora", "pissa", "lora-ga", "relora", "hira", "gralora", "scalora")


@every_kind
@pytest.mark.parametrize("method", LIKE_LORA)
def test_number_of_parameters_of_rank_r(kind, method):
    expected = sum(2 * (m + n) for m, n in target_shapes(kind)) + head_parameters(kind)
    assert sum(p.numel() for p in trainable(prepared(kind, method).model).values()) == expected


@every_kind
def test_number_of_parameters_of_the_others(kind):
    shapes, head = target_shapes(kind), head_parameters(kind)

    def count(method):
        return sum(p.numel() for p in trainable(prepared(kind, method).model).values()) - head

    lora = sum(2 * (m + n) for m, n in shapes)
    assert count("lora-2r") == 2 * lora
    assert count("lora-4r") == 4 * lora
    assert count("dora") == lora + sum(m for m, n in shapes)
    assert count("mora") == sum((math.floor(math.sqrt((m + n) * 2)) // 2 * 2) ** 2 for m, n in shapes)
    assert count("fourierft") == lora // len(shapes) * len(shapes)
    ranks = range(1, min(map(min, shapes)) + 1)
    by_rank = {b: sum(math.ceil(min(s) / b) * (b + min(s)) for s in shapes) for b in ranks}
    assert count("randlora") == min(by_rank.values(), key=lambda number: abs(number - lora))
    assert count("full") == count("galore") == sum(p.numel() for p in plain_model(kind).parameters()) - head


@every_kind
def test_hyperparameters_of_the_peft_methods(kind):
    def config(method):
        return prepared(kind, method).model.peft_config["default"]

    assert config("lora").lora_alpha == 4  # 2 r
    assert (config("lora-2r").r, config("lora-2r").lora_alpha) == (4, 8)
    assert (config("lora-4r").r, config("lora-4r").lora_alpha) == (8, 16)
    assert config("rslora").use_rslora and config("dora").use_dora
    assert config("pissa").init_lora_weights == "pissa_niter_16"
    assert config("lora-ga").init_lora_weights == "lora_ga" and config("lora-ga").lora_ga_config is not None
    assert config("eva").eva_config.use_label_mask == (kind == "llama")
    assert config("fourierft").scaling == 150
    assert config("randlora").randlora_alpha == 20 * config("randlora").r


@every_kind
@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"qlora", "qscalora"}))
def test_training_starts_from_the_base_model(kind, method):
    base, tokens = plain_model(kind).eval(), torch.arange(2, 16).reshape(2, 7)
    with torch.no_grad():
        started = prepared(kind, method).model.eval()(input_ids=tokens).logits
        torch.testing.assert_close(started, base(input_ids=tokens).logits, rtol=1e-4, atol=1e-5)


def test_lora_ga_starts_along_the_gradient():
    """A and B are the first and the next r singular directions of the loss's mean gradient, scaled as in the paper."""
    model, base = prepared("llama", "lora-ga").model, plain_model("llama")
    for start in range(0, 16, 4):
        (base(**collate(rows(False)[start : start + 4])).loss / 4).backward()
    for name, layer in model.base_model.model.named_modules():
        if isinstance(layer, LoraLayer):
            U, _, Vh = torch.linalg.svd(base.get_submodule(name).weight.grad)
            B, A = layer.lora_B["default"].weight, layer.lora_A["default"].weight
            scaled = len(B) ** 0.25 / 16**0.5 * torch.eye(2)
            torch.testing.assert_close((A @ Vh[:2].T).abs(), scaled, rtol=2e-2, atol=2e-2)
            torch.testing.assert_close((U[:, 2:4].T @ B).abs(), scaled, rtol=2e-2, atol=2e-2)


def test_eva_starts_along_the_activations():
    """A's rows are orthonormal, and hold nearly as much of the layer's inputs at the labels as its SVD could."""
    model, base = prepared("llama", "eva").model, plain_model("llama").eval()
    layers = {n: m for n, m in model.base_model.model.named_modules() if isinstance(m, LoraLayer)}
    assert sum(layer.r["default"] for layer in layers.values()) <= 2 * len(target_shapes("llama"))
    inputs = {name: [] for name in layers}
    for start in range(0, 16, 4):
        batch = collate(rows(False)[start : start + 4])
        hooks = [
            base.get_submodule(name).register_forward_pre_hook(
                lambda module, args, name=name, mask=batch["labels"] != -100: inputs[name].append(args[0][mask])
            )
            for name in layers
        ]
        with torch.no_grad():
            base(**batch)
        for hook in hooks:
            hook.remove()
    for name, layer in layers.items():
        A = layer.lora_A["default"].weight.detach()
        torch.testing.assert_close(A @ A.T, torch.eye(len(A)), rtol=1e-4, atol=1e-4)
        X = torch.cat(inputs[name]).numpy()
        most = (np.linalg.svd(X, compute_uv=False)[: len(A)] ** 2).sum()
        assert np.square(X @ A.numpy().T).sum() > 0.9 * most, name  # of what any orthonormal rows can hold


class Interrupted(Exception):
    pass


# Not those of PEFT that differ from these by their layers alone.
@pytest.mark.parametrize(
    "method",
    sorted(METHODS.keys() - {"lora-2r", "lora-4r", "rslora", "dora", "qlora", "hira", "gralora"}),
)
def test_a_continued_run_is_the_uninterrupted_one(method, tmp_path):
    def interrupt(model):
        raise Interrupted

    _, straight = run("llama", method, tmp_path / "straight", steps=5, save_steps=2)
    with pytest.raises(Interrupted):
        run("llama", method, tmp_path / "broken", steps=5, save_steps=2, eval_steps=3, evaluate=interrupt)
    assert (tmp_path / "broken" / "run" / "checkpoint-2").exists()
    _, continued = run("llama", method, tmp_path / "broken", steps=5, save_steps=2)
    assert [loss for _, _, loss in continued["losses"]] == [loss for _, _, loss in straight["losses"]]
    assert continued["effective_rank"] == straight["effective_rank"]


def test_without_moment_transport_only_the_moments_differ():
    carried, left = prepared("llama", "scalora"), prepared("llama", "scalora", moment_transport=False)
    assert carried.optimizer is None
    left.model.load_state_dict(carried.model.state_dict())
    states = []
    for model, optimizer_class in ((carried.model, torch.optim.AdamW), (left.model, left.optimizer[0])):
        optimizer = optimizer_class([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        tokens = torch.arange(2, 16).reshape(2, 7)
        for step in range(3):  # the first one only moves B
            optimizer.zero_grad()
            model(input_ids=tokens + step, labels=tokens + step).loss.backward()
            if step < 2:
                for module in model.modules():  # the automatic rescaling would let the weights part
                    if hasattr(module, "scalora_config"):
                        module.scalora_config["default"].scaling_interval = 100
                optimizer.step()
        before = {name: optimizer.state[p]["exp_avg"].clone() for name, p in trainable(model).items()}
        rescale(model, optimizer)
        after = {name: optimizer.state[p]["exp_avg"] for name, p in trainable(model).items()}
        states.append((before, after, trainable(model)))
    (before, after, factors), (before_left, after_left, factors_left) = states
    for name in factors:
        assert torch.equal(factors[name], factors_left[name]) and torch.equal(before[name], before_left[name])
        assert torch.equal(factors[name].grad, factors_left[name].grad)
        assert torch.equal(after_left[name], before_left[name])
        assert not torch.equal(after[name], before[name])


def test_a_run_without_moment_transport_uses_the_optimizer_of_the_ablation(tmp_path):
    assert prepared("llama", "scalora", moment_transport=False).optimizer[0] is UncarriedAdamW
    losses = [
        [loss for _, _, loss in run("llama", "scalora", tmp_path / str(t), steps=5, moment_transport=t)[1]["losses"]]
        for t in (True, False)
    ]
    assert losses[0][:2] == losses[1][:2] and losses[0][4] != losses[1][4]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "lorra"}, "method='lorra' must be one of full, galore, lora"),
        ({"method": "qlora"}, "method='qlora' needs a base in 4 bit"),
        ({"method": "qscalora"}, "method='qscalora' needs a base in 4 bit"),
        ({"method": "relora", "warmup_steps": 1}, "warmup_steps=1 must be below 1"),
        ({"method": "gralora", "r": 3}, "r=3 must be even: method='gralora'"),
        ({"method": "mora", "r": 64}, "r=64 makes MoRA's matrix"),
        ({"method": "eva", "r": 64}, "batch_size=4 gives method='eva' .* r=64 needs 128"),
    ],
)
def test_what_cannot_work_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        prepare(plain_model("llama"), settings(**fields), [collate(rows(False)[:4])])


@pytest.mark.parametrize("method", ["full", "galore", "pissa", "lora-ga", "relora", "mora"])
def test_a_quantized_base_is_refused_where_it_would_have_to_change(method, tmp_path):
    base = base_model("llama", "qlora", tmp_path)
    with pytest.raises(ValueError, match=f"method='{method}' needs a base that is not quantized"):
        prepare(base, settings(method), [])


def test_galore_without_its_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "galore_torch.galore_projector", None)
    with pytest.raises(ImportError, match=r"pip install '\.\[benchmark\]'"):
        prepare(plain_model("llama"), settings("galore"), [])


def test_galore_projects_the_target_layers_only(tmp_path):
    found = prepared("bert", "galore").arguments
    model = plain_model("bert")
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert set(found["optim_target_modules"]) == linear - {"classifier"}
    assert found["optim_args"] == "rank=2, update_proj_gap=50, scale=4"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attention_over_a_4_bit_base_is_in_the_type_that_is_asked_for(dtype, tmp_path, monkeypatch):
    base, seen = base_model("llama", "qlora", tmp_path, dtype), set()
    original = torch.nn.functional.scaled_dot_product_attention

    def attention(*args, **kwargs):
        output = original(*args, **kwargs)
        seen.add(output.dtype)
        return output

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    run("llama", "qlora", tmp_path / "run", model=base, dtype=dtype)
    assert seen == {getattr(torch, dtype)}


@pytest.mark.parametrize("method", ["qlora", "qscalora"])
def test_the_base_is_in_4_bit_but_for_the_head(method, tmp_path):
    from bitsandbytes.nn import Linear4bit

    model = base_model("bert", method, tmp_path)
    in_4_bit = {name for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert linear - in_4_bit == {"classifier"}
