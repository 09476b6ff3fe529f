"""scaling.py against the literal transcription of the paper and SciPy's non-negative least squares."""

import math

import numpy as np
import pytest
import reference
import torch
from helpers import GENERIC, SCALINGS, crossed_pair, problem, stack
from helpers_scaling import ETA, SEEDS, SHAPES, TARGET2, L, S, batch_of, grams, scales_of, solve_all
from scipy.optimize import minimize, nnls

from peft_scalora.maths import scaling
from peft_scalora.maths.scaling import normal_system


def system_of(problems):
    H, lam = normal_system(*grams(*stack(problems)))
    return H.numpy(), lam.numpy()


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
        got = torch.cat([scales.alpha_Lr[k], scales.beta_Lr[k]]).numpy()
        # Squares, as the bound determines α²: a true 0 that rounding moves to 1e-16 has a scale of 1e-8.
        weight = np.where(undetermined, 1.0, np.diag(H[k])) ** 0.5
        np.testing.assert_allclose(
            got**2 * weight, expected**2 * weight, rtol=1e-6, atol=1e-6 * (expected**2 * weight).max(), err_msg=names[k]
        )
        assert [label for label, mask_L in scales.scaled_by.items() if mask_L[k]] == [used], names[k]
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
    np.testing.assert_allclose(scales.beta_Lr[0] * np.linalg.norm(B, axis=0), math.sqrt(TARGET2), rtol=1e-9)
    np.testing.assert_array_equal(scales.alpha_Lr[0], 1)


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
