"""The rule "shrink" against the transcription of the paper: its scales, but none above 1."""

import math

import numpy as np
import pytest
import torch
from helpers import GENERIC, RULES, stack
from helpers_rescale import Net, adapted, change, factors_of, fill_factors, layers_of, random_gradients, scales_between
from helpers_scaling import ETA, SHAPES, TARGET2, L, S, batch_of, grams, scales_of
from reference import column_scaling, scalar_scaling
from test_rescale_algorithm import set_gradients

from peft_scalora import ScaLoRAConfig, rescale
from peft_scalora.maths import scaling
from peft_scalora.maths.scaling import SCALINGS, column_scales


def transcription(A, B, G, L=L, eta=ETA, s=S):
    """α and β of Theorem 5, of Theorem 3 where it has no answer, none above 1."""
    problem = A, B, G, L, eta, s
    scales = column_scaling(*problem) or scalar_scaling(*problem)
    return [np.minimum(each, 1) for each in scales]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scales_agree_with_the_transcription(shape, monkeypatch):
    monkeypatch.setattr(scaling, "MIN_COLUMN_NORM", 0.0)
    problems, names = batch_of(shape, GENERIC)
    scales = scales_of(problems, "shrink")
    expected = [np.concatenate(transcription(*problem)) for problem in problems]
    got = torch.cat([scales.alpha_Lr, scales.beta_Lr], -1).numpy()
    for name, have, want in zip(names, got, expected):
        np.testing.assert_allclose(have**2, want**2, rtol=1e-6, atol=1e-6, err_msg=name)
    assert 0.1 < (np.stack(expected) == 1).mean() < 0.95, "one side of the rule is not tested"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_column_grows_whatever_the_problem(shape):
    problems, _ = batch_of(shape)
    scales = scales_of(problems, "shrink")
    both = torch.cat([scales.alpha_Lr, scales.beta_Lr], -1)
    assert (both > 0).all() and (both <= 1).all()
    assert (torch.cat(scales_of(problems, "column")[:2], -1) > 1).any()


def test_columns_below_the_target_are_left_alone():
    """Orthogonal columns have their own optimum each: α_i = target / ‖a_i‖."""
    norms_A, norms_B = np.array([0.5, 2.0, 1.0]), np.array([3.0, 0.1, 1.5])
    A, B = np.eye(6, 3) * norms_A, np.eye(5, 3) * norms_B
    G = np.zeros((6, 5))
    G[np.arange(3), 3 + np.arange(3) % 2] = 1.0  # row i sees a_i only
    G[3 + np.arange(3) % 3, np.arange(3)] = 1.0  # column i sees b_i only
    A_LMr, B_LNr, GB, GtA = stack([(A, B, G)])
    one = torch.ones(1)
    scales = column_scales(*grams(A_LMr, B_LNr, GB, GtA), one, one, "shrink")
    np.testing.assert_allclose(scales.beta_Lr[0], np.minimum(1 / norms_B, 1), rtol=1e-6)
    assert (scales.alpha_Lr <= 1).all()


def test_the_target_follows_the_initial_norm_unless_the_configuration_names_one():
    """3 times the norm of the initialised factor for this rule, once for the paper's."""
    assert {name: SCALINGS[name].initial_norms for name in RULES} == dict.fromkeys(SCALINGS, 1) | {"shrink": 3}
    for column_norm2 in (None, 0.3):
        torch.manual_seed(0)
        model = fill_factors(adapted(Net(), scaling="shrink", column_norm2=column_norm2), size=1.0)
        before, expected = [], []
        rng = np.random.default_rng(0)
        for layer in layers_of(model)[:2]:
            G = rng.standard_normal((layer.out_features, layer.in_features))
            set_gradients(layer, G)
            before.append((layer, factors_of(layer)))
            lora_B, lora_A = factors_of(layer)
            target2 = column_norm2 or 3 * float(layer.scalora_norms["default"][0])
            scales = transcription(lora_B, lora_A.T, G, 1 / target2, 1, 1)
            floors = [0.1 * math.sqrt(target2) / np.linalg.norm(X, axis=0) for X in (lora_B, lora_A.T)]
            expected.append([np.maximum(x, np.minimum(floor, 1)) for x, floor in zip(scales, floors)])
        rescale(model)
        for (layer, old), want in zip(before, expected):
            for got, each in zip(scales_between(old, factors_of(layer)), want):
                np.testing.assert_allclose(got, each, rtol=1e-4)


def test_column_norm2_is_that_of_the_paper_s_rules_too():
    """column_norm2 = 1 / (L η s²), so both ways of naming a target give the same scales."""
    results = []
    for options in ({"smoothness": 1 / (0.05 * 2.0**2 * TARGET2)}, {"column_norm2": TARGET2}):
        torch.manual_seed(0)
        model = fill_factors(adapted(Net(), r=2, lora_alpha=4, scaling="column", **options))
        random_gradients(model)
        rescale(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05))
        results.append([factors_of(layer) for layer in layers_of(model)])
    for first, second in zip(*results):
        for a, b in zip(first, second):
            np.testing.assert_allclose(a, b, rtol=1e-5)


def test_the_function_stays_as_it_is():
    model = fill_factors(adapted(Net(), scaling="shrink", column_norm2=0.2), size=1.0)
    random_gradients(model)
    before = [change(layer) for layer in layers_of(model)]
    report = rescale(model)
    assert report.counts["shrink"] == report.layers == 3
    assert report.median_log_alpha > 0.02
    for layer, was in zip(layers_of(model), before):
        assert np.linalg.norm(change(layer) - was) < 1e-6 * np.linalg.norm(was)


@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf, "1", True, [1.0]])
def test_a_target_that_is_no_positive_number_is_refused(value):
    with pytest.raises(ValueError, match=r"column_norm2=.* must be a positive number or None"):
        ScaLoRAConfig(column_norm2=value)


def test_two_targets_are_refused():
    with pytest.raises(ValueError, match=r"smoothness=2\.0 and column_norm2=1\.0 both set the target norm"):
        ScaLoRAConfig(column_norm2=1.0, smoothness=2.0)
