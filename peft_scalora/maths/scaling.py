"""The column scales α, β of ScaLoRA (arXiv 2510.23818), batched over layers of one shape.

Shape suffixes: L layers, M out_features, N in_features, R adapter rank; `_L2R` joins both factors of a layer.
Paper A is PEFT's lora_B (M x R), paper B is lora_A transposed (N x R); G = dloss/dW is never formed, only G B and Gᵀ A.
Any common factor on all gradients cancels, so lora_B.grad = s G B and lora_A.gradᵀ = s Gᵀ A serve as they are.
Everything is float64: the system H squares the condition number of the factors.

One gradient step on the scaled factors changes the loss by at most ½ uᵀ H u - λᵀ u, u = [α²; β²] L η s², u ≥ 0.
This is the least-squares problem ½ ‖Σ u_i Z_i - G‖² with Z_i = a_i a_iᵀ G and Z_{R+i} = G b_i b_iᵀ, H their Gram matrix
and λ_i = <Z_i, G>. All solvers work on Z_i / ‖Z_i‖ (H with a unit diagonal), where rounding has one scale.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Directions of the unit-diagonal H below this are linear dependence of columns, not information.
RANK_TOLERANCE = 1e-10
# A determined coefficient this far below zero, relative to the largest, is a zero that rounding moved.
NEGATIVE_TOLERANCE = 1e-9
# No column is shrunk below this fraction of the target norm: a factor scaled to 0 would restart its Adam moments,
# and the steps that follow would be (1 - β1) / sqrt(1 - β2), about 3 times, too long.
MIN_COLUMN_NORM = 0.1


class Scales(NamedTuple):
    """Column scales of a batch of layers, and how each layer got them."""

    alpha_LR: Tensor
    beta_LR: Tensor
    by_column_L: Tensor  # bool: Theorem 5 had a non-negative solution
    skipped_L: Tensor  # bool: zero or non-finite gradient, all scales are 1


def gram_matrices(left_LMK: Tensor, right_LKN: Tensor) -> tuple[Tensor, Tensor]:
    """leftᵀ left and right rightᵀ, (L, K, K), in float64.

    Of S_A = [A, G B] and S_Bᵀ = [Gᵀ A, B]ᵀ they are all that the scales need to know; O((M + N) R²) a layer.
    """
    left_LMK, right_LKN = left_LMK.double(), right_LKN.double()
    return left_LMK.mT @ left_LMK, right_LKN @ right_LKN.mT


def is_finite(matrix_LKK: Tensor) -> Tensor:
    """Of every layer (L, 1, 1) whether all entries are finite; only then is their sum less itself 0."""
    total_L11 = matrix_LKK.sum((-2, -1), keepdim=True)
    return total_L11 - total_L11 == 0


def _halves(first_L2R2R: Tensor, second_L2R2R: Tensor) -> Tensor:
    """The first half of one diagonal and the second half of the other."""
    R = first_L2R2R.shape[-1] // 2
    first_L2R, second_L2R = (t.diagonal(dim1=-2, dim2=-1) for t in (first_L2R2R, second_L2R2R))
    return torch.cat([first_L2R[..., :R], second_L2R[..., R:]], dim=-1)


def normal_system(gram_A_L2R2R: Tensor, gram_B_L2R2R: Tensor) -> tuple[Tensor, Tensor]:
    """H = (S_AᵀS_A) ∘ (S_BᵀS_B) and λ, the squared norms of the columns of Gᵀ A and G B (Theorem 5)."""
    return gram_A_L2R2R * gram_B_L2R2R, _halves(gram_B_L2R2R, gram_A_L2R2R)


def _unit_diagonal(H_L2R2R: Tensor, lam_L2R: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """H and λ of the normalised Z_i, and the 1 / ‖Z_i‖, which is 0 for a zero Z_i.

    A zero Z_i gets the equation v_i = 0, which decouples it.
    """
    norm_L2R = H_L2R2R.diagonal(dim1=-2, dim2=-1).sqrt()
    inverse_L2R = torch.where(norm_L2R > 0, 1 / norm_L2R, 0)
    H_L2R2R = H_L2R2R * inverse_L2R[..., None] * inverse_L2R[..., None, :]
    H_L2R2R.diagonal(dim1=-2, dim2=-1).fill_(1)
    return H_L2R2R, lam_L2R * inverse_L2R, inverse_L2R


def least_squares(H_L2R2R: Tensor, lam_L2R: Tensor) -> Tensor:
    """Minimum-norm solution v of H v = λ for H with a unit diagonal; λ lies in the range of H by construction."""
    values_L2R, vectors_L2R2R = torch.linalg.eigh(H_L2R2R)
    cutoff_L1 = RANK_TOLERANCE * values_L2R[..., -1:]
    inverse_L2R = torch.where(values_L2R > cutoff_L1, 1 / values_L2R, 0)
    return (vectors_L2R2R @ (inverse_L2R[..., None] * (vectors_L2R2R.mT @ lam_L2R[..., None])))[..., 0]


def scalar_solution(H_L2R2R: Tensor, lam_L2R: Tensor) -> Tensor:
    """u with one value x for all columns of A and one, y, for all of B (Theorem 3), every case of it."""
    R = lam_L2R.shape[-1] // 2
    h_L22 = H_L2R2R.unflatten(-1, (2, R)).unflatten(-3, (2, R)).sum((-3, -1))
    lam_L2 = lam_L2R.unflatten(-1, (2, R)).sum(-1)
    # A pair per layer: what concerns x, and its counterpart for y.
    h_own_L2 = h_L22.diagonal(dim1=-2, dim2=-1)
    h_other_L2, h_both_L1 = h_own_L2.flip(-1), h_L22[..., 0, 1:]
    C_own_L2 = lam_L2 * h_other_L2 - lam_L2.flip(-1) * h_both_L1
    product_L1 = h_own_L2[..., :1] * h_own_L2[..., 1:]
    C_L1 = product_L1 - h_both_L1 * h_both_L1
    alone_L2 = torch.where(h_own_L2 > 0, lam_L2 / h_own_L2, 0)
    # A Aᵀ G and G B Bᵀ collinear: any mixture of the two lone solutions is optimal, half of each has the least norm.
    collinear_L1 = C_L1 <= RANK_TOLERANCE * product_L1
    value_L2 = torch.where(collinear_L1, alone_L2 / 2, C_own_L2 / C_L1)
    wanted_L2 = C_own_L2 > 0
    only_L2 = (h_other_L2 == 0) | (~collinear_L1 & wanted_L2 & ~wanted_L2.flip(-1))
    value_L2 = torch.where(only_L2, alone_L2, torch.where(only_L2.flip(-1), 0, value_L2))
    return value_L2.repeat_interleave(R, dim=-1)


def nonnegative_least_squares(H_L2R2R: Tensor, lam_L2R: Tensor) -> Tensor:
    """Minimise ½ vᵀ H v - λᵀ v over v ≥ 0 for H with a unit diagonal, by Lawson and Hanson's active set.

    A fixed number of rounds without a branch on a value: a layer that has converged stays where it is.
    """
    size = lam_L2R.shape[-1]
    eye = torch.eye(size, dtype=H_L2R2R.dtype, device=H_L2R2R.device)
    tolerance_L1 = NEGATIVE_TOLERANCE * lam_L2R.amax(-1, keepdim=True)
    v_L2R, free_L2R = torch.zeros_like(lam_L2R), torch.zeros_like(lam_L2R, dtype=torch.bool)
    for _ in range(3 * size):
        # Solve on the free coefficients; a held one has the equation v = 0.
        both = free_L2R[..., None] & free_L2R[..., None, :]
        target_L2R = least_squares(torch.where(both, H_L2R2R, eye), torch.where(free_L2R, lam_L2R, 0))
        blocked_L2R = free_L2R & (target_L2R <= 0)
        feasible_L1 = ~blocked_L2R.any(-1, keepdim=True)
        # Infeasible: go as far as the first coefficient that reaches 0, and hold it.
        tiny = torch.finfo(v_L2R.dtype).tiny
        distance_L2R = torch.where(blocked_L2R, v_L2R / (v_L2R - target_L2R).clamp(min=tiny), torch.inf)
        step_L1 = torch.where(feasible_L1, 1, distance_L2R.amin(-1, keepdim=True))
        first_L2R = blocked_L2R & (distance_L2R <= step_L1)
        v_L2R = torch.where(first_L2R, 0, v_L2R + step_L1 * (target_L2R - v_L2R)).clamp(min=0)
        free_L2R = free_L2R & ~first_L2R
        # Feasible: free the held coefficient whose growth lowers the bound most, if there is one.
        descent_L2R = torch.where(free_L2R, -torch.inf, lam_L2R - (H_L2R2R @ v_L2R[..., None])[..., 0])
        best_L1, index_L1 = descent_L2R.max(-1, keepdim=True)
        grows_L2R = torch.zeros_like(free_L2R).scatter(-1, index_L1, feasible_L1 & (best_L1 > tolerance_L1))
        free_L2R = free_L2R | grows_L2R
    return v_L2R


def solve(H_L2R2R: Tensor, lam_L2R: Tensor, scaling: str) -> tuple[Tensor, Tensor, Tensor]:
    """u of every layer by `scaling` ("column", "scalar" or "exact"; column falls back to scalar).

    Returns u_L2R, which of its entries the gradient determines, and for which layers Theorem 5 gave the answer.
    An undetermined entry (zero column or zero gradient) is 0 in u and means: keep the scale 1.
    """
    unit_H_L2R2R, unit_lam_L2R, inverse_L2R = _unit_diagonal(H_L2R2R, lam_L2R)
    determined_L2R = inverse_L2R > 0
    by_column_L1 = torch.zeros_like(determined_L2R[..., :1])
    if scaling == "exact":
        u_L2R = nonnegative_least_squares(unit_H_L2R2R, unit_lam_L2R) * inverse_L2R
    else:
        u_L2R = scalar_solution(H_L2R2R, lam_L2R)
        if scaling == "column":
            v_L2R = least_squares(unit_H_L2R2R, unit_lam_L2R)
            by_column_L1 = (v_L2R >= -NEGATIVE_TOLERANCE * v_L2R.abs().amax(-1, keepdim=True)).all(-1, keepdim=True)
            u_L2R = torch.where(by_column_L1, v_L2R.clamp(min=0) * inverse_L2R, u_L2R)
    return torch.where(determined_L2R, u_L2R, 0), determined_L2R, by_column_L1[..., 0]


def column_scales(
    gram_A_L2R2R: Tensor, gram_B_L2R2R: Tensor, norm2_alpha_L: Tensor, norm2_beta_L: Tensor, scaling: str
) -> Scales:
    """α and β of every layer, float64, never 0, NaN or infinite.

    norm2_alpha_L and norm2_beta_L are 1 / (L η s²) with the base learning rate η of lora_A and of lora_B: the squared
    norm that orthogonal columns are brought to. A layer whose gradient is zero or not finite keeps all scales at 1.
    """
    finite_L11 = is_finite(gram_A_L2R2R + gram_B_L2R2R)
    gram_A_L2R2R, gram_B_L2R2R = (torch.where(finite_L11, gram, 0) for gram in (gram_A_L2R2R, gram_B_L2R2R))
    u_L2R, determined_L2R, by_column_L = solve(*normal_system(gram_A_L2R2R, gram_B_L2R2R), scaling)

    norm2_L21 = torch.stack([norm2_alpha_L, norm2_beta_L], -1).double()[..., None]
    u_L2R, column_norm2_L2R = (t.unflatten(-1, (2, -1)) for t in (u_L2R, _halves(gram_A_L2R2R, gram_B_L2R2R)))
    smallest_L2R = (MIN_COLUMN_NORM * (norm2_L21 / column_norm2_L2R).sqrt()).clamp(max=1)
    scales_L2R = torch.maximum((u_L2R * norm2_L21).sqrt(), smallest_L2R)
    scales_L2R = torch.where(determined_L2R.view_as(scales_L2R) & scales_L2R.isfinite(), scales_L2R, 1)
    alpha_LR, beta_LR = scales_L2R.unbind(-2)
    skipped_L = ~determined_L2R.any(-1)
    return Scales(alpha_LR, beta_LR, by_column_L & ~skipped_L, skipped_L)
