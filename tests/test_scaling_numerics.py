"""scaling.py where the paper is silent: the floor, gradients that are not finite or zero, powers of two."""

import itertools
import math

import numpy as np
import pytest
import reference
import torch
from helpers import GENERIC, RULES, problem, stack
from helpers_scaling import SHAPES, TARGET2, batch_of, grams, scales_of, solve_all, tensors_of
from torch import nn

from peft_scalora.maths import scaling
from peft_scalora.maths.scaling import column_scales

FLOOR = 0.1  # of the target norm, as docs/method.md promises


@pytest.mark.parametrize("how", RULES)
def test_scales_are_the_same_bits_for_any_power_of_two_on_the_gradient(how):
    problems, _ = batch_of((3, 7, 6))
    A, B, GB, GtA = (X.float() for X in stack(problems))
    target2 = torch.linspace(0.1, 1, len(problems))
    first = column_scales(*grams(A, B, GB, GtA), target2, target2, how)
    assert (first.alpha_Lr != 1).any()
    first = tensors_of(first)
    for k in range(-20, 21):
        scales = tensors_of(column_scales(*grams(A, B, GB * 2.0**k, GtA * 2.0**k), target2, target2, how))
        for name, expected in first.items():
            assert torch.equal(expected, scales[name]), (name, k)


@pytest.mark.parametrize("how", RULES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_column_is_shrunk_below_the_floor(how, shape, monkeypatch):
    problems, names = batch_of(shape)
    A, B, _, _ = stack(problems)
    norms = torch.cat([A.square().sum(-2), B.square().sum(-2)], -1).sqrt().numpy()
    smallest = np.minimum(norms, FLOOR * math.sqrt(TARGET2))
    scales = torch.cat(scales_of(problems, how)[:2], -1).numpy()
    with monkeypatch.context() as patch:
        patch.setattr(scaling, "MIN_COLUMN_NORM", 0.0)
        literal = torch.cat(scales_of(problems, how)[:2], -1).numpy()

    assert np.isfinite(scales).all() and (scales > 0).all()
    assert (scales * norms >= smallest * (1 - 1e-6)).all(), names
    held = literal * norms < smallest
    if shape == (3, 7, 6) and how != "scalar":
        assert held.any(), "the floor is not tested"
    np.testing.assert_allclose((scales * norms)[held], smallest[held], rtol=1e-6)
    np.testing.assert_array_equal(scales[~held], literal[~held])


def test_a_column_below_the_floor_is_not_shrunk():
    problems = [problem("positive", 3, 7, 6, seed) for seed in range(20)]
    problems = [(1e-4 * A, 1e-5 * B, G) for A, B, G in problems]
    u, _, _ = solve_all(problems, "exact")
    scales = torch.cat(scales_of(problems, "exact")[:2], -1).numpy()
    assert (u[:, :3] == 0).any() and (u[:, 3:] == 0).any()
    np.testing.assert_array_equal(scales[u == 0], 1)


def longest_updates(seed, how, monkeypatch, floor, steps=1000, after=30, lr=1e-3, m=16, n=12, r=4):
    """Longest per-element AdamW update, in units of the learning rate, in the steps after one rescaling.

    A (m, r) and B (n, r) are trained on noisy gradients. The gradient of the step that rescales is one for which the
    literal solution is 0 for a column of some size; it is small, so that it is not itself a spike.
    Returns that, the smallest scale, and the same length with no rescaling at all.
    """
    monkeypatch.setattr(scaling, "MIN_COLUMN_NORM", floor)
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    A, B = nn.Parameter(torch.randn(m, r) * 0.2), nn.Parameter(torch.randn(n, r) * 0.2)
    drift = torch.randn(m, n) * 0.1
    target2 = torch.tensor([0.2**2 * m])
    runs = [(A, B), (nn.Parameter(A.detach().clone()), nn.Parameter(B.detach().clone()))]
    optimizers = [torch.optim.AdamW(pair, lr=lr, weight_decay=0.0) for pair in runs]
    longest, smallest = [0.0, 0.0], None
    for step in range(steps + after):
        G = drift + torch.randn(m, n)
        if step == steps:
            G = zeroing_gradient(A.detach().double().numpy(), B.detach().double().numpy(), how, rng).float()
            G *= 0.1 * math.sqrt(m * n) / G.norm()
        for k, ((a, b), optimizer) in enumerate(zip(runs, optimizers)):
            a.grad, b.grad = G @ b.detach(), G.mT @ a.detach()
            if step == steps and k == 0:
                scales = column_scales(
                    *grams(a.detach()[None], b.detach()[None], a.grad[None], b.grad[None]),
                    target2,
                    target2,
                    how,
                )
                alpha, beta = scales.alpha_Lr[0].float(), scales.beta_Lr[0].float()
                smallest = float(torch.minimum(alpha.min(), beta.min()))
                for parameter, own, other in ((a, alpha, beta), (b, beta, alpha)):
                    parameter.data.mul_(own)
                    parameter.grad.mul_(other)
                    optimizer.state[parameter]["exp_avg"].mul_(other)
                    optimizer.state[parameter]["exp_avg_sq"].mul_(other**2)
            before = [p.detach().clone() for p in (a, b)]
            optimizer.step()
            if step > steps:
                update = max(float((p.detach() - q).abs().max()) for p, q in zip((a, b), before)) / lr
                longest[k] = max(longest[k], update)
    return longest[0], smallest, longest[1]


def zeroing_gradient(A, B, how, rng):
    """G for which the literal scaling of A, B has a zero."""
    if how == "scalar":  # β = 0, see `crossed_pair`: along pairs of singular vectors of A and B
        U, a, _ = np.linalg.svd(A, full_matrices=False)
        V, b, _ = np.linalg.svd(B, full_matrices=False)
        a, b = a**2, b**2
        pairs = itertools.product(itertools.permutations(range(len(a)), 2), repeat=2)
        of_A, of_B = next((i, j) for i, j in pairs if 1.05 < 1.05 * a[i[1]] / a[i[0]] < b[j[1]] / b[j[0]])
        candidates = [U[:, of_A] @ V[:, of_B].T]
    else:
        shapes = (len(A), 2), (2, len(B))
        candidates = [np.matmul(*(np.abs(rng.standard_normal(shape)) for shape in shapes)) for _ in range(20)]
    scalings = [getattr(reference, f"{how}_scaling")(A, B, G, 1, 1, 1) for G in candidates]
    G = next(G for G, scales in zip(candidates, scalings) if np.min(scales) == 0)
    return torch.tensor(G)


@pytest.mark.parametrize("how", ["exact", "scalar"])
@pytest.mark.parametrize("seed", range(3))
def test_the_floor_bounds_the_updates_that_follow_a_rescaling(seed, how, monkeypatch):
    """A factor at 0 restarts its partner's Adam moments: first updates of (1 - β1) / sqrt(1 - β2) = 3.2 lr and more."""
    literal, zero, undisturbed = longest_updates(seed, how, monkeypatch, floor=0.0)
    assert zero < 1e-6
    assert undisturbed < 1.3
    assert literal > 3
    floored, smallest, _ = longest_updates(seed, how, monkeypatch, floor=FLOOR)
    assert smallest > 0
    assert floored <= 1.6


@pytest.mark.parametrize("how", RULES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_layer_with_a_gradient_that_is_not_finite_is_skipped_alone(how, bad):
    problems, _ = batch_of((3, 7, 6), GENERIC)
    A, B, GB, GtA = stack(problems)
    target2 = torch.ones(len(problems))
    expected = column_scales(*grams(A, B, GB, GtA), target2, target2, how)
    GB[2, 1, 0] = bad
    GtA[5, 0, 2] = bad
    scales = column_scales(*grams(A, B, GB, GtA), target2, target2, how)
    others = [k for k in range(len(problems)) if k not in (2, 5)]
    assert scales.skipped_L.tolist() == [k in (2, 5) for k in range(len(problems))]
    assert not any(mask_L[[2, 5]].any() for mask_L in scales.scaled_by.values())
    assert (scales.alpha_Lr[[2, 5]] == 1).all() and (scales.beta_Lr[[2, 5]] == 1).all()
    scales, expected = tensors_of(scales), tensors_of(expected)
    for name, want in expected.items():
        torch.testing.assert_close(scales[name][others], want[others], rtol=1e-9, atol=0)


@pytest.mark.parametrize("how", RULES)
def test_a_zero_gradient_is_skipped(how):
    scales = scales_of([problem("zero_gradient", 3, 7, 6, 0), problem("random", 3, 7, 6, 0)], how)
    assert scales.skipped_L.tolist() == [True, False]
    assert (scales.alpha_Lr[0] == 1).all() and (scales.beta_Lr[0] == 1).all()
    assert (scales.alpha_Lr[1] != 1).any()


def test_each_factor_has_its_own_learning_rate():
    """1 / (L η s²) enters α with the rate of lora_A and β with that of lora_B; u itself has no rate in it."""
    problems, _ = batch_of((3, 7, 6), ("random",))
    A, B, GB, GtA = stack(problems)
    one = torch.ones(len(problems))
    both = column_scales(*grams(A, B, GB, GtA), 100 * one, 100 * one, "scalar")
    apart = column_scales(*grams(A, B, GB, GtA), 400 * one, 100 * one, "scalar")
    torch.testing.assert_close(apart.alpha_Lr, 2 * both.alpha_Lr, rtol=1e-12, atol=0)
    assert torch.equal(apart.beta_Lr, both.beta_Lr)
