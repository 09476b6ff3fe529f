"""accumulator.py against NumPy's SVD of the explicit product."""

import numpy as np
import pytest
import reference
import torch

from peft_scalora.maths.accumulator import effective_rank, fold_factors, singular_values, truncate

L, M, N = 3, 17, 13


def product(kind, K, seed=0):
    """P (L, M, K) and Q (L, K, N) in float64."""
    rng = np.random.default_rng([seed, K])
    P, Q = rng.standard_normal((L, M, K)), rng.standard_normal((L, K, N))
    if kind == "decaying":
        P = P * 10.0 ** -np.linspace(0, 2, K)
        Q = Q * 10.0 ** -np.linspace(0, 2, K)[:, None]
    elif kind == "rank-deficient P":
        P[..., K // 2 :] = P[..., : K - K // 2] * 2
    elif kind == "rank-deficient Q":
        Q[..., K // 2 :, :] = -Q[..., : K - K // 2, :]
    elif kind == "rank-deficient both":
        P[..., -1] = P[..., 0]
        Q[..., max(K - 2, 0), :] = Q[..., 0, :]
    elif kind == "zero columns":
        P[..., ::2] = 0
    elif kind == "equal singular values":
        P = np.linalg.qr(P)[0] if K <= M else P
        Q = np.linalg.qr(Q.swapaxes(1, 2))[0].swapaxes(1, 2) if K <= N else Q
    elif kind == "uneven sizes":  # lora_B after its first steps beside a grown accumulator, and the reverse for Q
        P, Q = P * 10.0 ** np.linspace(0, -5, K), Q * 10.0 ** np.linspace(-1, 4, K)[:, None]
    elif kind == "one zero layer":
        P[1] = 0
    elif kind == "zero":
        P[:] = 0
    elif kind != "random":
        raise ValueError(kind)
    return P, Q


KINDS = (
    "random",
    "decaying",
    "rank-deficient P",
    "rank-deficient Q",
    "rank-deficient both",
    "zero columns",
    "equal singular values",
    "uneven sizes",
    "one zero layer",
    "zero",
)


def truncated(P, Q, rank):
    U, V, discarded = truncate(torch.tensor(P), torch.tensor(Q), rank)
    assert U.dtype == V.dtype == torch.float32 and discarded.dtype == torch.float64
    return U.double().numpy(), V.double().numpy(), discarded.numpy()


# (K, rank): one column left out, most left out, none, more room than columns, more columns than the weight has rank
SIZES = [(6, 5), (8, 2), (5, 5), (5, 9), (20, 6)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("K, rank", SIZES)
def test_truncate_is_the_best_approximation(kind, K, rank):
    P, Q = product(kind, K)
    U, V, discarded = truncated(P, Q, rank)
    assert U.shape == (L, M, min(K, rank)) and V.shape == (L, min(K, rank), N)
    for layer in range(L):
        whole = P[layer] @ Q[layer]
        sigma = np.linalg.svd(whole, compute_uv=False)
        size, best = sigma[0], np.linalg.norm(sigma[rank:])
        error = np.linalg.norm(whole - U[layer] @ V[layer])
        assert abs(error - best) <= 2e-6 * size
        # Singular values come from Gram matrices in float64: true to 1e-7 of the largest.
        assert abs(discarded[layer] - best) <= 1e-6 * best + 1e-7 * size


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("K, rank", SIZES)
def test_truncate_balances_its_factors(kind, K, rank):
    """Both factors carry Σ^½ and are orthogonal: UᵀU = V Vᵀ = Σ."""
    P, Q = product(kind, K)
    U, V, _ = truncated(P, Q, rank)
    for layer in range(L):
        sigma = np.linalg.svd(P[layer] @ Q[layer], compute_uv=False)[: U.shape[-1]]
        sigma = np.pad(sigma, (0, U.shape[-1] - len(sigma)))[::-1]  # ascending
        for gram in (U[layer].T @ U[layer], V[layer] @ V[layer].T):
            np.testing.assert_allclose(gram, np.diag(sigma), rtol=0, atol=2e-6 * sigma.max())


def test_a_layer_does_not_depend_on_its_batch():
    P, Q = product("random", 8)
    P[1] *= 1e6
    Q[2] *= 1e-6
    U, V, discarded = truncated(P, Q, 3)
    for layer in range(L):
        alone_U, alone_V, alone = truncated(P[layer : layer + 1], Q[layer : layer + 1], 3)
        whole = U[layer] @ V[layer]
        np.testing.assert_allclose(alone_U[0] @ alone_V[0], whole, atol=1e-6 * np.abs(whole).max())
        np.testing.assert_allclose(alone, discarded[layer : layer + 1], rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_layer_that_is_not_finite_does_not_stop_the_others(bad):
    P, Q = product("random", 8)
    expected = truncated(P, Q, 3)
    P[1, 0, 0] = bad
    U, V, discarded = truncated(P, Q, 3)
    assert np.isnan(discarded[1])
    assert not np.isfinite(U[1] @ V[1]).any()
    for layer in (0, 2):
        np.testing.assert_allclose(U[layer] @ V[layer], expected[0][layer] @ expected[1][layer], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(discarded[layer], expected[2][layer], rtol=1e-9)
    assert np.isnan(singular_values(torch.tensor(P), torch.tensor(Q))[1]).all()


def test_truncating_what_fits_already_changes_nothing_more():
    """The second recompression of a rank-R product has nothing to leave out."""
    P, Q = product("random", 12)
    U, V, _ = truncated(P, Q, 4)
    U2, V2, discarded = truncated(U, V, 4)
    size = np.linalg.norm(U @ V, axis=(1, 2))
    assert (discarded <= 1e-7 * size).all()
    assert (np.linalg.norm(U2 @ V2 - U @ V, axis=(1, 2)) <= 1e-6 * size).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("K", [1, 5, 20])
def test_singular_values(kind, K):
    P, Q = product(kind, K)
    sigma = singular_values(torch.tensor(P), torch.tensor(Q)).numpy()
    assert sigma.shape == (L, K)
    for layer in range(L):
        expected = np.linalg.svd(P[layer] @ Q[layer], compute_uv=False)
        expected = np.pad(expected, (0, max(0, K - len(expected))))[:K]
        np.testing.assert_allclose(sigma[layer], expected, rtol=0, atol=1e-7 * expected[0])
        large = expected > 1e-3 * expected[0]
        np.testing.assert_allclose(sigma[layer][large], expected[large], rtol=1e-6)


def test_small_singular_values_of_float32_factors():
    rng = np.random.default_rng(0)
    U, V = (np.linalg.qr(rng.standard_normal((k, 8)))[0] for k in (M, N))
    expected = 10.0 ** -np.arange(8.0)
    P, Q = torch.tensor(U * np.sqrt(expected)).float(), torch.tensor((V * np.sqrt(expected)).T).float()
    exact = np.linalg.svd(P.double().numpy() @ Q.double().numpy(), compute_uv=False)
    sigma = singular_values(P, Q)
    assert sigma.dtype == torch.float64
    np.testing.assert_allclose(sigma[:6], exact[:6], rtol=1e-3)
    np.testing.assert_allclose(sigma, exact[:8], rtol=0, atol=1e-7)


@pytest.mark.parametrize("tol", [0.5, 0.1, 0.01, 1e-4])
@pytest.mark.parametrize("kind", ["random", "decaying", "rank-deficient P", "one zero layer", "zero"])
def test_effective_rank(kind, tol):
    P, Q = product(kind, 9)
    ranks = effective_rank(singular_values(torch.tensor(P), torch.tensor(Q)), tol)
    assert ranks.tolist() == [reference.singular_rank(P[layer] @ Q[layer], tol) for layer in range(L)]


def test_fold_factors_are_the_fold():
    rng = np.random.default_rng(0)
    A, B = rng.standard_normal((L, M, 4)), rng.standard_normal((L, N, 4))
    alpha, beta = rng.uniform(0, 3, (L, 4)), rng.uniform(0, 3, (L, 4))
    U, V = fold_factors(*map(torch.tensor, (A, B.swapaxes(1, 2), 1 - alpha * beta)), 1.7)
    for layer in range(L):
        expected = reference.fold(A[layer], B[layer], alpha[layer], beta[layer], 1.7)
        np.testing.assert_allclose(U[layer] @ V[layer], expected, rtol=1e-12, atol=1e-12)


def test_truncated_folds_stay_below_the_sum_of_what_was_discarded():
    """Many folds into little room: the error of the whole is at most the sum of the reported norms."""
    rng = np.random.default_rng(0)
    U, V = np.zeros((1, M, 0)), np.zeros((1, 0, N))
    exact, reported = np.zeros((M, N)), 0.0
    for _ in range(50):
        dU, dV = rng.standard_normal((1, M, 2)), rng.standard_normal((1, 2, N))
        exact += dU[0] @ dV[0]
        U, V, discarded = truncated(np.concatenate([U, dU], 2), np.concatenate([V, dV], 1), 6)
        reported += float(discarded[0])
    error = np.linalg.norm(exact - U[0] @ V[0])
    assert error <= reported
    assert error > 0.1 * np.linalg.norm(exact), "nothing was truncated"
