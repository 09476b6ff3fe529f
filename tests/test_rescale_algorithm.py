"""The whole algorithm step by step, its learning rates and its report."""

import copy

import numpy as np
import pytest
import reference
import torch
from helpers import SCALINGS
from helpers_rescale import (
    Chain,
    Net,
    accumulated,
    adapted,
    backward,
    change,
    factors_of,
    fill_factors,
    layers_of,
    random_gradients,
    scales_between,
    trainable,
)
from torch import nn

from peft_scalora import last_report, rescale
from peft_scalora.maths import scaling

# The whole algorithm


def algorithm_pair(how, interval, seed, steps, monkeypatch, optimizer, dtype, schedule, **config):
    """Train one layer with the package and with the transcription; yields both after every step."""
    monkeypatch.setattr(scaling, "MIN_COLUMN_NORM", 0.0)  # the paper has no floor
    m, n, r, eta, weight_decay = 9, 7, 2, 5e-3, 0.1 if optimizer == "AdamW" else 0.0
    rng = np.random.default_rng(seed)
    x, W = rng.standard_normal((40, n)), rng.standard_normal((m, n)) / 3
    y = x @ (W + rng.standard_normal((m, n)) / 3).T
    net = Chain(1, n, m)
    net.layers[0].weight.data = torch.tensor(W)
    s = 2.5 / r
    L = 3 / (eta * s**2)
    model = adapted(
        net.to(dtype), r=r, lora_alpha=2.5, scaling=how, scaling_interval=interval, smoothness=L, **config
    )  # fmt: skip
    (layer,) = layers_of(model)
    lora_A = layer.factors("default")[1]
    torch.manual_seed(seed)
    nn.init.normal_(lora_A, std=0.2)
    method = getattr(torch.optim, optimizer)(trainable(model), lr=eta, weight_decay=weight_decay)
    rates = torch.optim.lr_scheduler.LambdaLR(method, schedule)
    oracle = reference.ReferenceScaLoRA(
        layer.get_base_layer().weight.detach().numpy(), np.zeros((m, r)), lora_A.detach().numpy().T,
        lambda weight: (x @ weight.T - y).T @ x / len(x),
        s=s, L=L, eta=eta, mode=how, interval=interval, weight_decay=weight_decay,
    )  # fmt: skip
    base = layer.get_base_layer().weight.detach().double().numpy().copy()
    tx, ty = torch.tensor(x, dtype=dtype), torch.tensor(y, dtype=dtype)
    for _ in range(steps):
        model.zero_grad()
        ((model(tx) - ty).square().sum() / 2 / len(x)).backward()
        oracle.step(rates.get_last_lr()[0])
        method.step()
        rates.step()
        yield layer, oracle, base, last_report(method)


def assert_close(a, b, tolerance):
    assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)


@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize("how", SCALINGS)
@pytest.mark.parametrize("config", [{"accumulator_rank": 64}, {"accumulator_rank": 7}], ids=["never full", "full"])
@pytest.mark.parametrize("optimizer", ["Adam", "AdamW"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.float64, 1e-6)], ids=str)
def test_the_algorithm_step_by_step(dtype, tolerance, optimizer, config, how, interval, monkeypatch):
    """Weight and factors after each of 20 steps, with a warmup, against the paper in float64."""
    seed, used, scaled = {"column": 3, "scalar": 0, "exact": 1}[how], [], 0

    def warmup(step):
        return min(1.0, (step + 1) / 8)

    run = algorithm_pair(how, interval, seed, 20, monkeypatch, optimizer, dtype, warmup, **config)
    for step, (layer, oracle, base, report) in enumerate(run, start=1):
        lora_B, lora_A = factors_of(layer)
        assert_close(base + change(layer), oracle.weight, tolerance / 10)
        assert_close(lora_B, oracle.A, tolerance)
        assert_close(lora_A.T, oracle.B, tolerance)
        if step % interval == 0:
            assert min(oracle.alpha.min(), oracle.beta.min()) > 1e-3, "choose a seed where the paper zeroes nothing"
            used.append(oracle.used)
            assert (report.column, report.scalar, report.exact) == tuple(oracle.used == rule for rule in SCALINGS)
            scaled += np.abs(np.log(oracle.alpha)).max() > 0.01
        assert layer.progress("default").rescalings == step // interval
    assert scaled >= 4
    assert np.linalg.norm(accumulated(layer)) > 0.02 * np.linalg.norm(change(layer)), "little was folded"
    if how == "column" and interval == 1:
        assert set(used) == {"column", "scalar"}


# Learning rates


def expected_scales(layer, factors, G, how, L, eta_B, eta_A):
    """α with the rate of lora_A, β with that of lora_B, by the transcription; u itself has no rate in it."""
    B, A = factors
    s = layer.scaling["default"]

    def both(eta):
        scales = reference.column_scaling(B, A.T, G, L, eta, s) if how == "column" else None
        rule = reference.exact_scaling if how == "exact" else reference.scalar_scaling
        return scales or rule(B, A.T, G, L, eta, s)

    return both(eta_A)[0], both(eta_B)[1]


def set_gradients(layer, G):
    lora_B, lora_A = layer.factors("default")
    s = layer.scaling["default"]
    lora_B.grad = (s * torch.tensor(G) @ lora_A.detach().double().T).float()
    lora_A.grad = (s * lora_B.detach().double().T @ torch.tensor(G)).float()


@pytest.mark.parametrize("how", SCALINGS)
@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("eta_B, eta_A", [(2e-3, 2e-3), (3.2e-2, 2e-3)], ids=["one rate", "LoRA+"])
def test_smoothness_goes_with_the_base_learning_rate_of_each_factor(eta_B, eta_A, scheduled, how, monkeypatch):
    """In the middle of a warmup the scheduled rate is a tenth of it. LoRA+ gives lora_B a rate of its own.

    s is the scale that the adapter has now, not the configured one.
    """
    monkeypatch.setattr(scaling, "MIN_COLUMN_NORM", 0.0)
    L = 123.0
    model = fill_factors(adapted(Chain(1, 8, 10), scaling=how, smoothness=L))
    (layer,) = layers_of(model)
    layer.set_scale("default", 0.6)
    lora_B, lora_A = layer.factors("default")
    optimizer = torch.optim.AdamW([{"params": [lora_B], "lr": eta_B}, {"params": [lora_A], "lr": eta_A}])
    if scheduled:
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.1)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * eta_B)
    G = np.random.default_rng(5).standard_normal((10, 8))
    set_gradients(layer, G)
    before = factors_of(layer)
    rescale(model, optimizer)
    expected = expected_scales(layer, before, G, how, L, eta_B, eta_A)
    for got, want in zip(scales_between(before, factors_of(layer)), expected):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * want.max())


def test_auto_smoothness_keeps_the_norm_of_the_initialised_factor(monkeypatch):
    """1 / (L η s²) is the mean squared column norm of lora_A at the start, whatever the rate and its present norm."""
    monkeypatch.setattr(scaling, "MIN_COLUMN_NORM", 0.0)
    model = adapted(Chain(1, 8, 10))
    (layer,) = layers_of(model)
    target2 = np.mean(np.sum(factors_of(layer)[1] ** 2, axis=1))
    fill_factors(model, size=3.0)
    with torch.no_grad():
        layer.factors("default")[1].mul_(7)
    optimizer = torch.optim.AdamW(trainable(model), lr=0.3)
    G = np.random.default_rng(5).standard_normal((10, 8))
    set_gradients(layer, G)
    before, s = factors_of(layer), layer.scaling["default"]
    rescale(model, optimizer)
    expected = expected_scales(layer, before, G, "column", 1 / (target2 * s**2), 1.0, 1.0)
    for got, want in zip(scales_between(before, factors_of(layer)), expected):
        np.testing.assert_allclose(got, want, rtol=1e-4)


# The report


def test_the_report():
    """Its counts against the transcription's branches, its median against NumPy, of two scalings in one model."""
    model = fill_factors(adapted(Chain(9, 8, 10), r=4))
    layers = layers_of(model)
    for layer in layers[6:]:
        layer.scalora_config = {"default": copy.copy(layer.scalora_config["default"])}
        layer.scalora_config["default"].scaling = "exact"
    rng = np.random.default_rng(0)
    expected = {"column": 0, "scalar": 0, "exact": 2}
    for k, layer in enumerate(layers):
        G = rng.standard_normal((10, 8))
        set_gradients(layer, G)
        B, A = factors_of(layer)
        if k < 5:
            expected["scalar" if reference.column_scaling(B, A.T, G, 1, 1, 1) is None else "column"] += 1
    layers[5].factors("default")[0].grad = None
    layers[8].factors("default")[0].grad.zero_()
    layers[8].factors("default")[1].grad.zero_()
    before = [factors_of(layer) for layer in layers]
    report = rescale(model)
    assert {rule: getattr(report, rule) for rule in SCALINGS} == expected
    assert min(expected.values()) > 0
    assert (report.layers, report.skipped) == (9, 2)
    logs = [
        np.abs(np.log(scales_between(b, factors_of(layer))[0]))
        for k, (b, layer) in enumerate(zip(before, layers))
        if k not in (5, 8)
    ]
    assert report.median_log_alpha == pytest.approx(np.median(np.concatenate(logs)), rel=1e-4)
    assert report.median_log_alpha > 0.05


def test_fold_error_is_what_rounding_did():
    model = fill_factors(adapted(Chain(4, 8, 10), r=4))
    random_gradients(model)
    before = [(change(layer), factors_of(layer)) for layer in layers_of(model)]
    report = rescale(model)
    errors = [
        np.linalg.norm(change(layer) - was) / np.linalg.norm(layer.scaling["default"] * B @ A)
        for layer, (was, (B, A)) in zip(layers_of(model), before)
    ]
    assert 1e-9 < max(errors) < 1e-6
    assert report.fold_error == pytest.approx(max(errors), rel=0.5, abs=2e-8)


def test_the_report_can_be_read():
    model = fill_factors(adapted(Net()))
    backward(model)
    report = rescale(model)
    for figure in ("layers=3", "column=", "skipped=0", "fold_error="):
        assert figure in repr(report)
