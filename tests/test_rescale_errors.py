"""Gradients that say nothing are skipped, and what cannot be rescaled is refused."""

import math

import numpy as np
import pytest
import torch
from helpers_optimizers import make
from helpers_rescale import (
    NEVER,
    Net,
    accumulated,
    adapted,
    backward,
    change,
    factors_of,
    fill_factors,
    layers_of,
    move,
    random_gradients,
    same,
    scales_between,
    snapshot,
    train,
    trainable,
)
from peft import LoraConfig, get_peft_model

from peft_scalora import rescale

# Gradients that say nothing


def spoiled(kind, model):
    """Make the gradients of the first layer useless; returns the expected number of skipped layers."""
    lora_B, lora_A = layers_of(model)[0].factors("default")
    if kind == "nan":
        lora_A.grad[1, 2] = math.nan
    elif kind == "inf":
        lora_B.grad[3, 1] = -math.inf
    elif kind == "zero":
        lora_A.grad.zero_()
        lora_B.grad.zero_()
    elif kind == "missing":
        lora_A.grad = None
    elif kind == "both missing":
        lora_A.grad = lora_B.grad = None
    elif kind == "nan factor":
        lora_B.data[2, 0] = math.nan
        lora_B.grad.fill_(math.nan)
        lora_A.grad.fill_(math.nan)


@pytest.mark.parametrize("name", ["AdamW", "SGD momentum", "bnb AdamW32bit", "bnb AdamW8bit"])
@pytest.mark.parametrize(
    "config", [{"accumulator_rank": 64}, {}, {"accumulator_rank": 4}], ids=["lossless", "room", "full"]
)
@pytest.mark.parametrize("kind", ["nan", "inf", "zero", "missing", "both missing", "nan factor"])
def test_a_layer_without_a_usable_gradient_is_skipped_alone(kind, config, name):
    """Its parameters, gradients, accumulator and optimizer state keep their bits; its neighbours are rescaled.

    Where theirs are full, its accumulator is recompressed with theirs: the same change in other factors.
    """
    recompressed = config == {"accumulator_rank": 4} and "missing" not in kind
    model = fill_factors(adapted(Net(), scaling_interval=3, **config))
    optimizer = make(name, trainable(model))
    train(model, optimizer, 4)  # one rescaling, so that the accumulator is not empty
    move(model)
    first, second, last = layers_of(model)
    assert np.linalg.norm(accumulated(first)) > 0
    backward(model)
    spoiled(kind, model)
    saved, held, old = snapshot(model, optimizer), accumulated(first), [factors_of(layer) for layer in (second, last)]
    report = rescale(model, optimizer)
    assert (report.layers, report.skipped) == (3, 1)
    assert report.column + report.scalar == 2
    assert report.fold_error < 1e-6 and math.isfinite(report.discarded) and math.isfinite(report.median_log_alpha)
    for key, value in snapshot(model, optimizer).items():
        if ".first." in key and "progress" not in key and not (recompressed and "scalora_" in key):
            assert same(value, saved[key]), key
    np.testing.assert_allclose(accumulated(first), held, rtol=0, atol=recompressed * 1e-6 * np.abs(held).max())
    for layer, factors in zip((second, last), old):
        assert not np.allclose(scales_between(factors, factors_of(layer))[0], 1, atol=0.01)


def test_training_goes_on_after_a_layer_was_skipped():
    """Layers of one shape that were skipped at different times still end in accumulators that are right."""
    model = fill_factors(adapted(Net(), scaling_interval=NEVER, accumulator_rank=7))
    for count in range(12):
        move(model)
        random_gradients(model)
        before = [change(layer) for layer in layers_of(model)]
        norms = [float(layer.scalora_norms["default"][1]) for layer in layers_of(model)]
        if count % 3 == 0:
            spoiled("nan", model)
        if count % 4 == 0:
            layers_of(model)[count // 4 % 2].factors("default")[0].grad = None
        rescale(model)
        for layer, was, norm in zip(layers_of(model), before, norms):
            new = float(layer.scalora_norms["default"][1]) - norm
            assert np.linalg.norm(change(layer) - was) <= new * (1 + 1e-5) + 1e-5 * np.linalg.norm(was)


def test_no_gradient_at_all():
    model = adapted(Net())
    optimizer = torch.optim.AdamW(trainable(model))
    saved = snapshot(model)
    for report in (rescale(model, optimizer), rescale(model)):
        assert (report.layers, report.skipped, report.column, report.scalar, report.exact) == (3, 3, 0, 0, 0)
        assert (report.fold_error, report.discarded, report.median_log_alpha) == (0, 0, 0)
    assert all(same(value, saved[name]) for name, value in snapshot(model).items())


# Errors


def test_a_model_without_scalora_layers_is_refused():
    with pytest.raises(ValueError, match=r"model has no ScaLoRA layer: build it with get_peft_model"):
        rescale(get_peft_model(Net(), LoraConfig(target_modules=["first"])))


@pytest.mark.parametrize("rate", [None, 0.0])
def test_numeric_smoothness_needs_a_learning_rate(rate):
    model = fill_factors(adapted(Net(), smoothness=5.0))
    backward(model)
    optimizer = None if rate is None else torch.optim.SGD(trainable(model), lr=rate)
    with pytest.raises(ValueError, match=r"smoothness=5\.0 needs a learning rate above 0: pass the optimizer"):
        rescale(model, optimizer)


@pytest.mark.parametrize(
    "optimizer, states",
    [(torch.optim.Adadelta, "'square_avg', 'acc_delta' of optimizer Adadelta"),
     (torch.optim.Adafactor, "'row_var', 'col_var' of optimizer Adafactor")],
)  # fmt: skip
def test_unknown_optimizer_state_stops_the_training(optimizer, states):
    model = adapted(Net(), scaling_interval=NEVER)
    optimizer = optimizer(trainable(model))
    train(model, optimizer, 1)
    saved = snapshot(model)
    with pytest.raises(TypeError, match=states):
        train(model, optimizer, 1)
    with pytest.raises(TypeError, match=states):
        rescale(model, optimizer)
    assert all(
        same(value, saved[name])
        for name, value in snapshot(model).items()
        if "progress" not in name and "grad" not in name
    )
