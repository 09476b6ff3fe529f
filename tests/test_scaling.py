"""scaling.py against the literal transcription of the paper, SciPy's non-negative least squares and a real AdamW."""

import itertools
import math

import numpy as np
import pytest
import reference
import torch
from helpers import GENERIC, PROBLEMS, crossed_pair, problem, stack
from scipy.optimize import minimize, nnls
from torch import nn

from peft_scalora import scaling
from peft_scalora.scaling import column_scales, normal_system, solve

SCALINGS = ("column", "scalar", "exact")
# (r, m, n): r = 1, ordinary, r = min(m, n), r > min(m, n)
SHAPES = [(1, 5, 4), (3, 7, 6), (4, 4, 9), (6, 4, 3)]
SEEDS = range(4)
L, ETA, S = 3.7, 2e-3, 1.6
FLOOR = scaling.MIN_COLUMN_NORM
TARGET2 = 1 / (L * ETA * S**2)  # the squared norm that orthogonal columns are brought to


def batch_of(shape, kinds=PROBLEMS):
    """Every kind of problem of one shape in one batch, so that a degenerate layer could spoil its neighbours."""
    problems = [problem(kind, *shape, seed) for kind in kinds for seed in SEEDS]
    return problems, [f"{kind} {seed}" for kind in kinds for seed in SEEDS]


def scales_of(problems, how, target2=TARGET2, s=S):
    A, B, GB, GtA = stack(problems, s)
    target2_L = torch.full((len(problems),), target2, dtype=torch.float64)
    return column_scales(A, B, GB, GtA, target2_L, target2_L, how)


def system_of(problems):
    H, lam = normal_system(*stack(problems))
    return H.numpy(), lam.numpy()


def solve_all(problems, how):
    u, determined, by_column = solve(*normal_system(*stack(problems)), how)
    return u.numpy(), determined.numpy(), by_column.numpy()


def bound(u, H, lam):
    return 0.5 * u @ H @ u - lam @ u


def reference_u(A, B, G, how):
    """u by the literal transcription (nan where undetermined), and whether Theorem 5 gave it."""
    undetermined = np.diag(reference.normal_system(A, B, G)[0]) == 0
    scales, by_column = None, False
    if how == "column":
        scales = reference.column_scaling(A, B, G, 1, 1, 1)
        by_column = scales is not None
    if scales is None:
        scales = (reference.exact_scaling if how == "exact" else reference.scalar_scaling)(A, B, G, 1, 1, 1)
    return np.where(undetermined, np.nan, np.concatenate(scales) ** 2), by_column


def is_unique(H):
    """Whether the minimiser of the bound is determined well enough to compare it entry by entry."""
    size = np.sqrt(np.diag(H))
    unit = H[np.ix_(size > 0, size > 0)] / np.outer(size[size > 0], size[size > 0])
    return not len(unit) or np.linalg.cond(unit) < 1e7


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_normal_system_is_the_gram_system_of_the_update_directions(shape):
    problems, names = batch_of(shape)
    H, lam = system_of(problems)
    for k, name in enumerate(names):
        expected_H, expected_lam = reference.normal_system(*problems[k])
        np.testing.assert_allclose(H[k], expected_H, rtol=1e-9, atol=1e-12 * np.abs(expected_H).max(), err_msg=name)
        np.testing.assert_allclose(lam[k], expected_lam, rtol=1e-9, err_msg=name)


@pytest.mark.parametrize("how", SCALINGS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_solve_agrees_with_the_paper(how, shape):
    problems, names = batch_of(shape)
    H, lam = system_of(problems)
    u, determined, by_column = solve_all(problems, how)
    compared = 0
    for k, name in enumerate(names):
        expected, expected_by_column = reference_u(*problems[k], how)
        np.testing.assert_array_equal(determined[k], ~np.isnan(expected), err_msg=name)
        assert not u[k][~determined[k]].any(), name
        if determined[k].any():
            assert by_column[k] == expected_by_column, name
        expected = np.nan_to_num(expected)
        # Theorem 5 may leave rounding below zero, and a bound of nothing is compared with the size of its terms.
        scale = max(abs(bound(expected, H[k], lam[k])), 1e-300)
        assert abs(bound(u[k], H[k], lam[k]) - bound(expected, H[k], lam[k])) <= 1e-6 * scale, name
        if how != "exact" or is_unique(H[k]):
            size = np.sqrt(np.diag(H[k]))
            np.testing.assert_allclose(
                u[k] * size, expected * size, rtol=1e-6, atol=1e-6 * np.abs(expected * size).max(), err_msg=name
            )
            compared += 1
    assert compared >= len(names) // 2


@pytest.mark.parametrize("how", SCALINGS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_column_scales_agree_with_the_paper(how, shape, monkeypatch):
    """With L, η, s and the gradients as PEFT has them; without the floor, which the paper does not have."""
    monkeypatch.setattr(scaling, "MIN_COLUMN_NORM", 0.0)
    problems, names = batch_of(shape, (*GENERIC, "zero_column_of_A", "zero_column_of_B", "zero_A", "unseen_column"))
    H, _ = system_of(problems)
    scales = scales_of(problems, how)
    for k, (A, B, G) in enumerate(problems):
        if how == "exact" and not is_unique(H[k]):
            continue
        alpha, beta, used = None, None, how
        if how == "column":
            theorem5 = reference.column_scaling(A, B, G, L, ETA, S)
            used = "column" if theorem5 else "scalar"
            alpha, beta = theorem5 or (None, None)
        if alpha is None:
            alpha, beta = getattr(reference, f"{used}_scaling")(A, B, G, L, ETA, S)
        # Undetermined columns keep their scale in both, but Theorem 3 speaks for all columns of a factor.
        undetermined = np.diag(H[k]) == 0
        expected = np.where(undetermined, 1.0, np.concatenate([alpha, beta]))
        got = torch.cat([scales.alpha_LR[k], scales.beta_LR[k]]).numpy()
        # Squares, as the bound determines α²: a true 0 that rounding moves to 1e-16 has a scale of 1e-8.
        weight = np.where(undetermined, 1.0, np.diag(H[k])) ** 0.5
        np.testing.assert_allclose(
            got**2 * weight, expected**2 * weight, rtol=1e-6, atol=1e-6 * (expected**2 * weight).max(), err_msg=names[k]
        )
        assert scales.by_column_L[k] == (used == "column"), names[k]
        assert not scales.skipped_L[k], names[k]


def test_both_theorems_are_exercised():
    """The comparisons above would prove little if every problem took the same branch."""
    problems, _ = batch_of((3, 7, 6), GENERIC)
    _, _, by_column = solve_all(problems, "column")
    assert 0.2 < by_column.mean() < 0.9
    u, _, _ = solve_all(problems, "exact")
    assert 0.05 < (u == 0).mean() < 0.6


# a, b, σ of `crossed_pair`, and which of C_A, C_B is positive
CROSSED = [
    ((1.0, 2.0), (0.1, 1.0), (1.0, 1.3), (True, False)),
    ((2.0, 1.0), (1.0, 0.2), (0.4, 1.0), (True, False)),
    ((0.1, 1.0), (1.0, 2.0), (1.0, 1.0), (False, True)),
    ((1.0, 2.0), (2.0, 1.0), (1.0, 0.7), (True, True)),
    ((1.0, 2.0), (0.9, 1.1), (1.0, 0.7), (False, True)),
]


@pytest.mark.parametrize("how", ["scalar", "column"])
@pytest.mark.parametrize("a, b, sigma, signs", CROSSED)
def test_theorem_3_in_every_case(a, b, sigma, signs, how):
    problems = [crossed_pair(a, b, sigma, seed) for seed in SEEDS]
    u, _, by_column = solve_all(problems, how)
    for k, (A, B, G) in enumerate(problems):
        ZA, ZB = A @ A.T @ G, G @ B @ B.T
        h11, h22, h12 = np.sum(ZA * ZA), np.sum(ZB * ZB), np.sum(ZA * ZB)
        lam1, lam2 = np.sum(ZA * G), np.sum(ZB * G)
        assert ((lam1 * h22 - lam2 * h12) > 0, (lam2 * h11 - lam1 * h12) > 0) == signs
        if by_column[k]:
            continue
        best, _ = nnls(np.stack([ZA.ravel(), ZB.ravel()], axis=1), G.ravel())
        np.testing.assert_allclose(u[k], np.repeat(best, 2), rtol=1e-9, atol=1e-12)
        assert tuple(u[k][[0, 2]] > 0) == signs
    if how == "scalar":
        assert not by_column.any()


def test_theorem_3_where_both_updates_are_collinear():
    """A Aᵀ G and G B Bᵀ proportional: C = C_A = C_B = 0 up to rounding, and every mixture is equally good."""
    problems = [crossed_pair((2.0, 2.0), (0.3, 0.3), (1.0, 0.6), seed) for seed in SEEDS]
    problems += [problem("random", 1, 1, 1, seed) for seed in SEEDS]
    for A, B, G in problems:
        (u,), _, _ = solve_all([(A, B, G)], "scalar")
        expected, _ = reference_u(A, B, G, "scalar")
        np.testing.assert_allclose(u, expected, rtol=1e-6)
        H, lam = reference.normal_system(A, B, G)
        lone = lam[0] / H[0, 0] if len(u) == 2 else None
        optimum = minimize(lambda v, H=H, lam=lam: bound(np.repeat(v**2, len(lam) // 2), H, lam), [1.0, 1.0], tol=1e-14)
        assert bound(u, H, lam) <= optimum.fun * (1 - 1e-9)
        assert lone is None or np.isclose(u[0], lone / 2)


def test_orthogonal_columns_are_brought_to_the_norm_that_L_sets():
    rng = np.random.default_rng(0)
    B = np.linalg.qr(rng.standard_normal((8, 3)))[0] * [0.1, 2.0, 30.0]
    scales = scales_of([(np.zeros((5, 3)), B, rng.standard_normal((5, 8)))], "column")
    np.testing.assert_allclose(scales.beta_LR[0] * np.linalg.norm(B, axis=0), math.sqrt(TARGET2), rtol=1e-9)
    np.testing.assert_array_equal(scales.alpha_LR[0], 1)


def random_nnls_problem(rng, r, m, n):
    """Columns that repeat each other up to 1e-9 ... 1, decaying spectra, and all-positive entries."""
    A, B, G = rng.standard_normal((m, r)), rng.standard_normal((n, r)), rng.standard_normal((m, n))
    difference = 10.0 ** rng.uniform(-9, 0, r)
    which = rng.integers(4)
    if which in (0, 2):
        A = A[:, rng.integers(0, max(1, r // 4), r)] + difference * A
    if which in (1, 2):
        B = B[:, rng.integers(0, max(1, r // 4), r)] + difference * B
    if rng.random() < 0.5:
        G = G * np.exp(-rng.uniform(0, 2) * np.arange(n))
    if rng.random() < 0.5:
        A, B, G = np.abs(A), np.abs(B), np.abs(G)
    return A, B, G


@pytest.mark.parametrize(
    "r, m, n, count",
    [
        (1, 3, 2, 60),
        (2, 2, 2, 200),
        (4, 8, 12, 200),
        (8, 3, 3, 100),
        (16, 40, 24, 60),
        (16, 4, 4, 60),
        (16, 10, 12, 60),
    ],
)
def test_exact_is_the_nonnegative_least_squares_solution(r, m, n, count):
    rng = np.random.default_rng(r * m * n)
    problems = [random_nnls_problem(rng, r, m, n) for _ in range(count)]
    u, _, _ = solve_all(problems, "exact")
    unique = 0
    for (A, B, G), got in zip(problems, u):
        Z = np.stack([z.ravel() for z in reference.update_directions(A, B, G)], axis=1)
        size, whole = np.linalg.norm(Z, axis=0), np.linalg.norm(G)
        best, residual = nnls(Z / size, G.ravel() / whole)
        assert (got >= 0).all()
        # ½ ‖Z u - G‖² is the bound up to a constant; both sides in units of ½ ‖G‖², what the best u = 0 leaves.
        value = np.linalg.norm(Z @ got / whole - G.ravel() / whole) ** 2
        assert value <= residual**2 + 1e-6
        if 2 * r <= m * n and np.linalg.cond(Z / size) < 1e4:
            unique += 1
            np.testing.assert_allclose(got * size / whole, best, rtol=1e-6, atol=1e-6 * best.max())
    assert unique > count // 10 or 2 * r > m * n


def test_exact_lowers_the_bound_at_least_as_far_as_both_theorems():
    problems, names = batch_of((3, 7, 6))
    H, lam = system_of(problems)
    u = {how: solve_all(problems, how)[0] for how in SCALINGS}
    strictly = 0
    for k, name in enumerate(names):
        exact, column, scalar = (bound(u[how][k], H[k], lam[k]) for how in ("exact", "column", "scalar"))
        assert exact <= min(column, scalar) + 1e-9 * abs(exact), name
        assert column <= scalar + 1e-9 * abs(scalar), name
        strictly += exact < column - 1e-3 * abs(exact)
    assert strictly > 5


@pytest.mark.parametrize("how", SCALINGS)
def test_scales_are_the_same_bits_for_any_power_of_two_on_the_gradient(how):
    problems, _ = batch_of((3, 7, 6))
    A, B, GB, GtA = (X.float() for X in stack(problems))
    target2 = torch.linspace(0.1, 1, len(problems))
    first = column_scales(A, B, GB, GtA, target2, target2, how)
    assert (first.alpha_LR != 1).any()
    for k in range(-20, 21):
        scales = column_scales(A, B, GB * 2.0**k, GtA * 2.0**k, target2, target2, how)
        for name, expected, got in zip(scales._fields, first, scales):
            assert torch.equal(expected, got), (name, k)


@pytest.mark.parametrize("how", SCALINGS)
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
                    a.detach()[None], b.detach()[None], a.grad[None], b.grad[None], target2, target2, how
                )
                alpha, beta = scales.alpha_LR[0].float(), scales.beta_LR[0].float()
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


@pytest.mark.parametrize("how", SCALINGS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_layer_with_a_gradient_that_is_not_finite_is_skipped_alone(how, bad):
    problems, _ = batch_of((3, 7, 6), GENERIC)
    A, B, GB, GtA = stack(problems)
    target2 = torch.ones(len(problems))
    expected = column_scales(A, B, GB, GtA, target2, target2, how)
    GB[2, 1, 0] = bad
    GtA[5, 0, 2] = bad
    scales = column_scales(A, B, GB, GtA, target2, target2, how)
    others = [k for k in range(len(problems)) if k not in (2, 5)]
    assert scales.skipped_L.tolist() == [k in (2, 5) for k in range(len(problems))]
    assert not scales.by_column_L[[2, 5]].any()
    assert (scales.alpha_LR[[2, 5]] == 1).all() and (scales.beta_LR[[2, 5]] == 1).all()
    for got, want in zip(scales, expected):
        torch.testing.assert_close(got[others], want[others], rtol=1e-9, atol=0)


@pytest.mark.parametrize("how", SCALINGS)
def test_a_zero_gradient_is_skipped(how):
    scales = scales_of([problem("zero_gradient", 3, 7, 6, 0), problem("random", 3, 7, 6, 0)], how)
    assert scales.skipped_L.tolist() == [True, False]
    assert (scales.alpha_LR[0] == 1).all() and (scales.beta_LR[0] == 1).all()
    assert (scales.alpha_LR[1] != 1).all()


def test_each_factor_has_its_own_learning_rate():
    """1 / (L η s²) enters α with the rate of lora_A and β with that of lora_B; u itself has no rate in it."""
    problems, _ = batch_of((3, 7, 6), ("random",))
    A, B, GB, GtA = stack(problems)
    one = torch.ones(len(problems))
    both = column_scales(A, B, GB, GtA, 100 * one, 100 * one, "scalar")
    apart = column_scales(A, B, GB, GtA, 400 * one, 100 * one, "scalar")
    torch.testing.assert_close(apart.alpha_LR, 2 * both.alpha_LR, rtol=1e-12, atol=0)
    assert torch.equal(apart.beta_LR, both.beta_LR)
