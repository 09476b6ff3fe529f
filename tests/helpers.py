"""Problems (A, B, G) of one layer, random and degenerate, in the paper's names and shapes (see reference.py)."""

import numpy as np
import torch

SCALINGS = ("column", "scalar", "exact")  # of the paper, and the problem that it bounds
RULES = (*SCALINGS, "shrink")
GENERIC = ("random", "low_rank_gradient", "positive", "sizes")
DEGENERATE = (
    "zero_column_of_A",
    "zero_column_of_B",
    "zero_A",
    "zero_B",
    "unseen_column",
    "collinear_A",
    "collinear_both",
    "equal_columns",
    "zero_gradient",
)
PROBLEMS = GENERIC + DEGENERATE


def problem(kind, r, m, n, seed):
    """A (m, r), B (n, r), G (m, n) in float64."""
    rng = np.random.default_rng([seed, r, m, n])
    A, B, G = rng.standard_normal((m, r)), rng.standard_normal((n, r)), rng.standard_normal((m, n))
    if kind == "low_rank_gradient":
        G = rng.standard_normal((m, 2)) @ rng.standard_normal((2, n))
    elif kind == "positive":  # all terms of the bound overlap: Theorem 5 rarely has a non-negative solution
        A, B, G = np.abs(A), np.abs(B), np.abs(G)
    elif kind == "sizes":
        A, B = A * 10.0 ** rng.uniform(-3, 3, r), B * 10.0 ** rng.uniform(-3, 3, r)
    elif kind == "zero_column_of_A":
        A[:, 0] = 0
    elif kind == "zero_column_of_B":
        B[:, -1] = 0
    elif kind == "zero_A":  # lora_B before the first step
        A[:] = 0
    elif kind == "zero_B":
        B[:] = 0
    elif kind == "unseen_column":  # a_0 is not zero, but the gradient does not see it
        G[0] = 0
        A[:, 0] = 0
        A[0, 0] = 2.0
    elif kind == "collinear_A":
        A[:, -1] = -2 * A[:, 0]
    elif kind == "collinear_both":
        A[:, -1], B[:, -1] = 3 * A[:, 0], -0.5 * B[:, 0]
    elif kind == "equal_columns":
        A[:], B[:] = A[:, :1], B[:, :1]
    elif kind == "zero_gradient":
        G[:] = 0
    elif kind != "random":
        raise ValueError(kind)
    return A, B, G


def crossed_pair(a, b, sigma, seed, m=7, n=6):
    """r = 2 columns along the singular vectors of G, so that Theorem 3 can be steered.

    A Aᵀ = Σ a_k u_k u_kᵀ and B Bᵀ = Σ b_k v_k v_kᵀ give C_B = (σ_1 σ_2)² (a_2 - a_1)(b_1 a_2 - b_2 a_1): β = 0 where
    A and B both prefer the same direction and B does so more strongly. C_A is the same with a and b exchanged.
    """
    rng = np.random.default_rng(seed)
    U, V = (np.linalg.qr(rng.standard_normal((k, 2)))[0] for k in (m, n))
    mix = np.linalg.qr(rng.standard_normal((2, 2)))[0]  # the columns themselves need not be singular vectors
    return U * np.sqrt(a) @ mix, V * np.sqrt(b) @ mix, (U * sigma) @ V.T


def stack(problems, s=1.0):
    """A_LMR, B_LNR and the gradients of lora_B and of lora_A transposed, as PEFT has them (with its scaling s)."""
    A, B, G = (torch.tensor(np.stack(X)) for X in zip(*problems))
    return A, B, s * G @ B, s * G.mT @ A
