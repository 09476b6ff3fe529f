"""rescale.py on real PEFT models: what a rescaling leaves alone and what it carries along."""

import copy

import numpy as np
import pytest
import torch
from helpers import RULES, SCALINGS
from helpers_models import KINDS, output
from helpers_optimizers import OPTIMIZERS, make
from helpers_rescale import (
    Chain,
    Net,
    X,
    accumulated,
    adapted,
    backward,
    change,
    factors_of,
    fill_factors,
    layers_of,
    move,
    random_gradients,
    relative,
    scales_between,
    snapshot,
    train,
    trainable,
)

from peft_scalora import ScaLoRAConfig, rescale


@pytest.mark.parametrize(
    "accumulator", [{"accumulator_rank": 64}, {}, {"accumulator_rank": 12}], ids=["lossless", "default", "full"]
)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_rescaling_keeps_the_function_and_scales_the_gradients(name, accumulator):
    """Also where it is the fifth one and the accumulator is full, if the weight has no more than R directions."""
    model = adapted(Net(), target_modules=["first", "second", "last"], **accumulator)
    optimizer = make(name, trainable(model))
    for _ in range(5 if accumulator.get("accumulator_rank") else 1):
        train(model, optimizer, 4)
        move(model, size=0.6)
        backward(model)
        before, old, saved = model(X).detach(), [factors_of(layer) for layer in layers_of(model)], snapshot(model)
        report = rescale(model, optimizer)
        assert (report.layers, report.skipped) == (3, 0)
        assert relative(model(X).detach(), before) < 1e-5
    for layer, factors in zip(layers_of(model), old):
        alpha, beta = scales_between(factors, factors_of(layer))
        assert np.abs(np.log(alpha)).max() > 0.05 and np.abs(np.log(beta)).max() > 0.01, "nothing was rescaled"
    carried = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    assert any(relative(grad, saved[f"{n}.grad"]) > 0.05 for n, grad in carried.items())
    backward(model)
    for n, p in model.named_parameters():
        if p.requires_grad:
            assert relative(carried[n], p.grad) < 1e-4, n
    optimizer.step()
    assert all(p.isfinite().all() for p in trainable(model))


def test_state_is_carried_crosswise():
    model = adapted(Net())
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2, amsgrad=True)
    train(model, optimizer, 5)
    backward(model)
    old = [factors_of(layer) for layer in layers_of(model)]
    state = copy.deepcopy(optimizer.state)
    state = [[state_of for state_of in state.values()][i] for i in range(len(state))]
    rescale(model, optimizer)
    position = {id(p): i for i, p in enumerate(trainable(model))}
    for layer, before in zip(layers_of(model), old):
        alpha, beta = (torch.tensor(x).float() for x in scales_between(before, factors_of(layer)))
        lora_B, lora_A = layer.factors("default")
        for p, other in ((lora_B, beta[None]), (lora_A, alpha[:, None])):
            was, now = state[position[id(p)]], optimizer.state[p]
            assert (other.log().abs() > 0.05).any()
            torch.testing.assert_close(now["exp_avg"], was["exp_avg"] * other, rtol=1e-5, atol=0)
            torch.testing.assert_close(now["exp_avg_sq"], was["exp_avg_sq"] * other**2, rtol=1e-5, atol=0)
            torch.testing.assert_close(now["max_exp_avg_sq"], was["max_exp_avg_sq"] * other**2, rtol=1e-5, atol=0)
            assert now["step"] == was["step"]


@pytest.mark.parametrize("kind", ["Conv1D", "Embedding", "Conv2d", "MultiheadAttention", "GPT-2", "Llama"])
def test_one_rescaling_keeps_the_function_of_every_kind_of_layer(kind):
    kind = KINDS[kind]
    _, model = kind.filled(accumulator_rank=None, init_lora_weights=False)
    before = output(model, kind.inputs()).detach()
    (output(model, kind.inputs()) - torch.randn_like(before)).square().mean().backward()
    old = [factors_of(layer) for layer in layers_of(model)]
    report = rescale(model)
    assert report.layers == len(old) > 0 and report.skipped == 0
    assert relative(output(model, kind.inputs()).detach(), before) < 1e-5
    for layer, factors in zip(layers_of(model), old):
        assert not np.allclose(factors[1], factors_of(layer)[1], rtol=1e-2)


@pytest.mark.parametrize(
    "config",
    [
        {"use_rslora": True},
        {"rank_pattern": {"second": 5}, "alpha_pattern": {"last": 1}},
        {"r": 1},
        {"r": 20},
        {"r": 16, "accumulator_rank": 2},
        {"init_lora_weights": False, "smoothness": 300.0},
        {"init_lora_weights": "orthogonal", "r": 4},
        {"lora_bias": True},
    ],
    ids=str,
)
def test_one_rescaling_keeps_the_function_of_other_configurations(config):
    """With a scale that was changed after the adapter was made, at which the accumulator is applied too."""
    model = fill_factors(adapted(Net(), **config))
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    for scale in (1.0, 0.5, 3.0):
        for layer in layers_of(model):
            layer.set_scale("default", scale)
        train(model, optimizer, 3)
        backward(model)
        before, old = model(X).detach(), [factors_of(layer) for layer in layers_of(model)]
        discarded = rescale(model, optimizer).discarded
        if "accumulator_rank" not in config:
            assert relative(model(X).detach(), before) < 1e-5
            assert discarded < 1e-5
        assert any(
            np.abs(np.log(scales_between(f, factors_of(layer))[0])).max() > 0.01
            for f, layer in zip(old, layers_of(model))
        )


def test_two_adapters_at_once():
    model = adapted(Net(), init_lora_weights=False)
    model.add_adapter(
        "other", ScaLoRAConfig(r=3, scaling="column", target_modules=["first", "second"], init_lora_weights=False)
    )
    model.base_model.set_adapter(["default", "other"])
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    train(model, optimizer, 3)
    backward(model)
    before = model(X).detach()
    report = rescale(model, optimizer)
    assert (report.layers, report.skipped) == (5, 0)
    assert relative(model(X).detach(), before) < 1e-5
    for layer in layers_of(model)[:2]:
        assert min(np.linalg.norm(accumulated(layer, adapter)) for adapter in ("default", "other")) > 1e-3


@pytest.mark.parametrize("how", SCALINGS)
def test_a_thousand_rescalings_do_not_drift(how):
    model = fill_factors(adapted(Chain(2), r=4, scaling=how, accumulator_rank=16))
    expected = [change(layer) for layer in layers_of(model)]
    sizes = []
    for _ in range(1000):
        expected = [was + moved for was, moved in zip(expected, move(model))]
        random_gradients(model)
        report = rescale(model)
        assert (report.layers, report.skipped) == (2, 0)
        sizes.append(report.median_log_alpha)
    assert np.median(sizes) > 0.02, "the scales have to be away from 1"
    for layer, want in zip(layers_of(model), expected):
        assert np.linalg.norm(change(layer) - want) < 1e-4 * np.linalg.norm(want)
        assert np.linalg.norm(accumulated(layer)) > 0.9 * np.linalg.norm(want), "little was folded"
        assert layer.progress("default").rescalings == 1000


@pytest.mark.parametrize("rank", [2, 5, 11])
def test_a_truncated_accumulator_drifts_no_further_than_it_reports(rank):
    """rank 2 < r, one that a fold fills at once, and one that holds two folds."""
    model = fill_factors(adapted(Chain(2), r=4, accumulator_rank=rank))
    expected = [change(layer) for layer in layers_of(model)]
    for count in range(1, 1001):
        expected = [was + moved for was, moved in zip(expected, move(model))]
        random_gradients(model)
        rescale(model)
        if count in (1, 2, 3, 10, 100, 1000):
            for layer, want in zip(layers_of(model), expected):
                drift, norm = np.linalg.norm(change(layer) - want), float(layer.scalora_norms["default"][1])
                assert drift <= norm + 1e-6 * np.linalg.norm(want)
                assert (norm == 0) == (count * 4 <= rank)
    assert drift > 0.2 * np.linalg.norm(want), "little was truncated"


def test_discarded_is_what_numpy_would_leave_out():
    model = fill_factors(adapted(Chain(3, 14, 18), r=4, accumulator_rank=6))
    for count in range(5):
        move(model)
        random_gradients(model)
        before = [(accumulated(layer), factors_of(layer)) for layer in layers_of(model)]
        norms = [float(layer.scalora_norms["default"][1]) for layer in layers_of(model)]
        report = rescale(model)
        expected = []
        for layer, (held, (B, A)) in zip(layers_of(model), before):
            s = layer.scaling["default"]
            new_B, new_A = factors_of(layer)
            sigma = np.linalg.svd(held + s * B @ A - s * new_B @ new_A, compute_uv=False)
            expected.append(np.linalg.norm(sigma[6:]))
            assert float(layer.scalora_norms["default"][1]) - norms.pop(0) == pytest.approx(
                expected[-1], rel=1e-4, abs=1e-6
            )
        assert report.discarded == pytest.approx(np.linalg.norm(expected), rel=1e-4, abs=1e-6)
        assert (report.discarded > 1e-3) == (count > 0)


@pytest.mark.parametrize("r, kept", [(8, 56), (3, 55), (1, 55), (16, 64)])
def test_a_recompression_keeps_six_sevenths_of_the_columns(r, kept):
    """Of 64, in whole folds: up to 9 columns are free again for the next. A fold of 16 takes more: it keeps all.

    Columns that are not in use are zero.
    """
    model = fill_factors(adapted(Chain(1, 80, 72), r=r, accumulator_rank=64))
    (layer,) = layers_of(model)
    columns = []
    for _ in range(64 // r + 1):
        random_gradients(model)
        rescale(model)
        columns.append(layer.progress("default").columns)
        move(model)
    assert columns == [*range(r, 64 + 1, r), kept]
    U, V = layer.scalora_U["default"], layer.scalora_V["default"]
    assert (U.norm(dim=0) > 0).tolist() == (V.norm(dim=1) > 0).tolist() == [True] * kept + [False] * (64 - kept)


@pytest.mark.parametrize("how", SCALINGS)
def test_everything_is_the_same_bits_for_any_power_of_two_on_the_gradients(how):
    """Loss scaling and gradient accumulation without division do not matter."""
    start = fill_factors(adapted(Net(), scaling=how, accumulator_rank=4))
    backward(start)
    grads = [p.grad.clone() for p in trainable(start)]
    expected = None
    for k in [0, *range(-20, 21)]:
        model = copy.deepcopy(start)
        for p, grad in zip(trainable(model), grads):
            p.grad = grad * 2.0**k
        rescale(model)
        result = snapshot(model)
        if expected is None:
            expected = result
            assert not torch.equal(trainable(model)[0], trainable(start)[0])
        for name, value in result.items():
            factor = 2.0**k if name.endswith(".grad") else 1
            assert torch.equal(value, expected[name] * factor), (name, k)


@pytest.mark.parametrize("how", RULES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_rounding_takes_from_low_precision_factors_goes_into_the_accumulator(how, dtype):
    """Scaling rounds them by 2^-9 or 2^-12, and yet only the float32 accumulator rounds the function."""
    model = fill_factors(adapted(Net().to(dtype), autocast_adapter_dtype=False, scaling=how))
    for _ in range(3):
        move(model, size=2.0)
        random_gradients(model)
        before = [(change(layer), factors_of(layer)) for layer in layers_of(model)]
        rescale(model)
        for layer, (was, _) in zip(layers_of(model), before):
            assert all(p.dtype == dtype for p in layer.factors("default"))
            assert np.linalg.norm(change(layer) - was) < 1e-6 * np.linalg.norm(accumulated(layer))
    assert any(
        (scales_between(factors, factors_of(layer))[0] != 1).any()
        for layer, (_, factors) in zip(layers_of(model), before)
    )


def test_float64_adapters_are_scaled_as_exactly_as_their_accumulator_allows():
    """Not by powers of two: float64 has no rounding to avoid."""
    model = fill_factors(adapted(Net().double(), autocast_adapter_dtype=False))
    random_gradients(model)
    before = [(change(layer), factors_of(layer)) for layer in layers_of(model)]
    rescale(model)
    for layer, (was, factors) in zip(layers_of(model), before):
        assert all(p.dtype == torch.float64 for p in layer.factors("default"))
        alpha, _ = scales_between(factors, factors_of(layer))
        assert np.abs(np.log2(alpha) - np.round(np.log2(alpha))).max() > 1e-3
        assert np.linalg.norm(change(layer) - was) < 1e-6 * np.linalg.norm(was)


def test_a_layer_without_optimizer_state_does_not_shift_its_neighbours():
    """A layer that has never had a gradient has no state; the scales must not slip to another of its shape."""
    model = fill_factors(adapted(Net()))
    optimizer = make("AdamW", trainable(model))
    first, second, _ = layers_of(model)
    for _ in range(3):
        backward(model)
        for p in first.factors("default"):
            p.grad = None
        optimizer.step()
    backward(model)
    lora_B, lora_A = second.factors("default")
    old, held = factors_of(second), [optimizer.state[p]["exp_avg"].double().numpy() for p in (lora_B, lora_A)]
    report = rescale(model, optimizer)
    assert report.layers == 3 and report.skipped == 0
    assert not any(optimizer.state[p] for p in first.factors("default"))
    alpha, beta = scales_between(old, factors_of(second))
    new = [optimizer.state[p]["exp_avg"].double().numpy() for p in (lora_B, lora_A)]
    np.testing.assert_allclose(new[0], held[0] * beta, rtol=1e-5)
    np.testing.assert_allclose(new[1], held[1] * alpha[:, None], rtol=1e-5)
