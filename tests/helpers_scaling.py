"""Batches of problems and the scales that scaling.py gives them."""

import torch
from helpers import PROBLEMS, problem, stack

from peft_scalora.maths.scaling import SCALINGS, Problem, column_scales, gram_matrices, normal_system

# (r, m, n): r = 1, ordinary, r = min(m, n), r > min(m, n)
SHAPES = [(1, 5, 4), (3, 7, 6), (4, 4, 9), (6, 4, 3)]
SEEDS = range(4)
L, ETA, S = 3.7, 2e-3, 1.6
TARGET2 = 1 / (L * ETA * S**2)  # the squared norm that orthogonal columns are brought to


def batch_of(shape, kinds=PROBLEMS):
    """Every kind of problem of one shape in one batch, so that a degenerate layer could spoil its neighbours."""
    problems = [problem(kind, *shape, seed) for kind in kinds for seed in SEEDS]
    return problems, [f"{kind} {seed}" for kind in kinds for seed in SEEDS]


def grams(A, B, GB, GtA):
    """Gram matrices of S_A = [A, G B] and S_B = [Gᵀ A, B]."""
    return gram_matrices(torch.cat([A, GB], -1), torch.cat([GtA, B], -1).mT)


def scales_of(problems, how, target2=TARGET2, s=S):
    target2_L = torch.full((len(problems),), target2, dtype=torch.float64)
    return column_scales(*grams(*stack(problems, s)), target2_L, target2_L, how)


def tensors_of(scales):
    """Every tensor of `Scales` by name."""
    tensors = scales._asdict()
    return tensors | tensors.pop("scaled_by")


def solve_all(problems, how):
    """u of a rule, its determined entries, and the layers that Theorem 5 scaled: for a target of 1, α² is u."""
    H, lam = normal_system(*grams(*stack(problems)))
    one = torch.ones_like(lam)
    u, scaled_by = SCALINGS[how].rule(Problem(H, lam, norm2_L2r=one, target2_L2r=one))
    determined = H.diagonal(dim1=-2, dim2=-1) > 0
    by_column = scaled_by.get("column", torch.zeros_like(determined[:, 0]))
    return torch.where(determined, u, 0).numpy(), determined.numpy(), by_column.numpy()
