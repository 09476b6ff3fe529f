"""The column scales α, β of ScaLoRA (arXiv 2510.23818), batched over layers of one shape.

Names and shape suffixes are those of `peft_scalora.maths`. G = dloss/dW is never formed: the gradients of the factors,
s G rightᵀ and s leftᵀ G, are all that is needed, and any factor common to all of them cancels.
Everything is float64: the system H squares the condition number of the factors.

One gradient step on the scaled factors changes the loss by at most ½ uᵀ H u - λᵀ u, u = [α²; β²] L η s², u ≥ 0.
This is the least-squares problem ½ ‖Σ u_i Z_i - G‖² with Z_i = l_i l_iᵀ G for a column l_i of left and Z_{r+i} =
G r_i r_iᵀ for a row r_iᵀ of right. H is their Gram matrix and λ_i = <Z_i, G>. The solvers work on Z_i / ‖Z_i‖ (H with a
unit diagonal), where rounding has one scale.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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


class Problem(NamedTuple):
    """Bound ½ uᵀ H u - λᵀ u of a batch of layers, and the norms of the columns to scale. All float64.

    A column that the bound does not depend on has a zero in the diagonal of H; its scale is 1 whatever the rule says.
    """

    H_L2r2r: Tensor
    lam_L2r: Tensor
    norm2_L2r: Tensor  # squared norms of the columns
    target2_L2r: Tensor  # 1 / (L η s²): the squared norm that orthogonal columns are brought to, so that α² = u target²


class Scales(NamedTuple):
    """Column scales of a batch of layers, and how each layer got them."""

    alpha_Lr: Tensor
    beta_Lr: Tensor
    skipped_L: Tensor  # bool: zero or non-finite gradient, all scales are 1
    scaled_by: dict[str, Tensor]  # label -> bool mask_L; every layer that is not skipped is in one of them


def gram_matrices(left_LMK: Tensor, right_LKN: Tensor) -> tuple[Tensor, Tensor]:
    """Return leftᵀ left and right rightᵀ, (L, K, K), in float64; O((M + N) K²) a layer."""
    left_LMK, right_LKN = left_LMK.double(), right_LKN.double()
    return left_LMK.mT @ left_LMK, right_LKN @ right_LKN.mT


def is_finite(matrix_LKK: Tensor) -> Tensor:
    """Return (L, 1, 1): True where every entry of a layer is finite.

    `total - total` is 0 for finite sums and nan otherwise, so that no device value is read.
    """
    total_L11 = matrix_LKK.sum((-2, -1), keepdim=True)
    return total_L11 - total_L11 == 0


def _halves(first_L2r2r: Tensor, second_L2r2r: Tensor) -> Tensor:
    """Join the first half of one diagonal and the second half of the other."""
    r = first_L2r2r.shape[-1] // 2
    first_L2r = first_L2r2r.diagonal(dim1=-2, dim2=-1)
    second_L2r = second_L2r2r.diagonal(dim1=-2, dim2=-1)
    return torch.cat([first_L2r[..., :r], second_L2r[..., r:]], dim=-1)


def normal_system(gram_left_L2r2r: Tensor, gram_right_L2r2r: Tensor) -> tuple[Tensor, Tensor]:
    """Return H and λ of the bound (Theorem 5).

    Args:
        gram_left_L2r2r: SᵀS of S = [left, gradient of left], (M x 2r); the paper's S_A.
        gram_right_L2r2r: S Sᵀ of S = [gradient of right; right], (2r x N); the paper's S_B transposed.

    Returns:
        H, the entrywise product of both, and λ, the squared norms of the gradients' columns. A common factor of the
        gradients does not change the scales.
    """
    return gram_left_L2r2r * gram_right_L2r2r, _halves(gram_right_L2r2r, gram_left_L2r2r)


def _unit_diagonal(H_L2r2r: Tensor, lam_L2r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return H and λ of the normalised Z_i, and the 1 / ‖Z_i‖, which is 0 for a zero Z_i.

    A zero Z_i gets the equation v_i = 0, which decouples it.
    """
    norm_L2r = H_L2r2r.diagonal(dim1=-2, dim2=-1).sqrt()
    inverse_L2r = torch.where(norm_L2r > 0, 1 / norm_L2r, 0)
    H_L2r2r = H_L2r2r * inverse_L2r[..., None] * inverse_L2r[..., None, :]
    H_L2r2r.diagonal(dim1=-2, dim2=-1).fill_(1)
    return H_L2r2r, lam_L2r * inverse_L2r, inverse_L2r


def least_squares(H_L2r2r: Tensor, lam_L2r: Tensor) -> Tensor:
    """Return the minimum-norm solution v of H v = λ, for H with a unit diagonal. λ lies in the range of H."""
    values_L2r, vectors_L2r2r = torch.linalg.eigh(H_L2r2r)
    cutoff_L1 = RANK_TOLERANCE * values_L2r[..., -1:]
    inverse_L2r = torch.where(values_L2r > cutoff_L1, 1 / values_L2r, 0)
    return (vectors_L2r2r @ (inverse_L2r[..., None] * (vectors_L2r2r.mT @ lam_L2r[..., None])))[..., 0]


def scalar_solution(H_L2r2r: Tensor, lam_L2r: Tensor) -> Tensor:
    """Return u with one value, x, for all columns of left and one, y, for all of right (Theorem 3)."""
    r = lam_L2r.shape[-1] // 2
    h_L22 = H_L2r2r.unflatten(-1, (2, r)).unflatten(-3, (2, r)).sum((-3, -1))
    lam_L2 = lam_L2r.unflatten(-1, (2, r)).sum(-1)
    # A pair per layer: what concerns x, and its counterpart for y.
    h_own_L2 = h_L22.diagonal(dim1=-2, dim2=-1)
    h_other_L2, h_both_L1 = h_own_L2.flip(-1), h_L22[..., 0, 1:]
    C_own_L2 = lam_L2 * h_other_L2 - lam_L2.flip(-1) * h_both_L1
    product_L1 = h_own_L2[..., :1] * h_own_L2[..., 1:]
    C_L1 = product_L1 - h_both_L1 * h_both_L1
    alone_L2 = torch.where(h_own_L2 > 0, lam_L2 / h_own_L2, 0)
    # Both updates collinear: any mixture of the two lone solutions is optimal, half of each has the least norm.
    collinear_L1 = C_L1 <= RANK_TOLERANCE * product_L1
    value_L2 = torch.where(collinear_L1, alone_L2 / 2, C_own_L2 / C_L1)
    wanted_L2 = C_own_L2 > 0
    only_L2 = (h_other_L2 == 0) | (~collinear_L1 & wanted_L2 & ~wanted_L2.flip(-1))
    value_L2 = torch.where(only_L2, alone_L2, torch.where(only_L2.flip(-1), 0, value_L2))
    return value_L2.repeat_interleave(r, dim=-1)


def nonnegative_least_squares(H_L2r2r: Tensor, lam_L2r: Tensor) -> Tensor:
    """Minimise ½ vᵀ H v - λᵀ v over v ≥ 0 for H with a unit diagonal, by Lawson and Hanson's active set.

    A fixed number of rounds without a branch on a value: a layer that has converged stays where it is.
    """
    size = lam_L2r.shape[-1]
    eye = torch.eye(size, dtype=H_L2r2r.dtype, device=H_L2r2r.device)
    tolerance_L1 = NEGATIVE_TOLERANCE * lam_L2r.amax(-1, keepdim=True)
    v_L2r, free_L2r = torch.zeros_like(lam_L2r), torch.zeros_like(lam_L2r, dtype=torch.bool)
    for _ in range(3 * size):
        # Solve on the free coefficients; a held one has the equation v = 0.
        both = free_L2r[..., None] & free_L2r[..., None, :]
        target_L2r = least_squares(torch.where(both, H_L2r2r, eye), torch.where(free_L2r, lam_L2r, 0))
        blocked_L2r = free_L2r & (target_L2r <= 0)
        feasible_L1 = ~blocked_L2r.any(-1, keepdim=True)
        # Infeasible: go as far as the first coefficient that reaches 0, and hold it.
        tiny = torch.finfo(v_L2r.dtype).tiny
        distance_L2r = torch.where(blocked_L2r, v_L2r / (v_L2r - target_L2r).clamp(min=tiny), torch.inf)
        step_L1 = torch.where(feasible_L1, 1, distance_L2r.amin(-1, keepdim=True))
        first_L2r = blocked_L2r & (distance_L2r <= step_L1)
        v_L2r = torch.where(first_L2r, 0, v_L2r + step_L1 * (target_L2r - v_L2r)).clamp(min=0)
        free_L2r = free_L2r & ~first_L2r
        # Feasible: free the held coefficient whose growth lowers the bound most, if there is one.
        descent_L2r = torch.where(free_L2r, -torch.inf, lam_L2r - (H_L2r2r @ v_L2r[..., None])[..., 0])
        best_L1, index_L1 = descent_L2r.max(-1, keepdim=True)
        grows_L2r = torch.zeros_like(free_L2r).scatter(-1, index_L1, feasible_L1 & (best_L1 > tolerance_L1))
        free_L2r = free_L2r | grows_L2r
    return v_L2r


@dataclass(frozen=True)
class Scaling:
    """Rule to scale the columns by: an entry of `SCALINGS`.

    Args:
        rule: a function of a `Problem` that returns the squared scales α² and β² as one _L2r, none negative, and which
            layers were scaled how, {label: bool mask_L}, every layer in one. Reports and logs count by these labels. It
            reads no device value.
        initial_norms: the squared norm that columns are brought to where the configuration names none, in units of the
            mean squared column norm of the freshly initialised factor.
    """

    rule: Callable[[Problem], tuple[Tensor, dict[str, Tensor]]]
    initial_norms: float = 1.0


def column_rule(problem: Problem) -> tuple[Tensor, dict[str, Tensor]]:
    """Solve H u = λ where its solution is not negative (Theorem 5); scale the other layers by Theorem 3."""
    unit_H_L2r2r, unit_lam_L2r, inverse_L2r = _unit_diagonal(problem.H_L2r2r, problem.lam_L2r)
    v_L2r = least_squares(unit_H_L2r2r, unit_lam_L2r)
    by_column_L = (v_L2r >= -NEGATIVE_TOLERANCE * v_L2r.abs().amax(-1, keepdim=True)).all(-1)
    scalar_L2r = scalar_solution(problem.H_L2r2r, problem.lam_L2r)
    u_L2r = torch.where(by_column_L[..., None], v_L2r.clamp(min=0) * inverse_L2r, scalar_L2r)
    return u_L2r * problem.target2_L2r, {"column": by_column_L, "scalar": ~by_column_L}


def scalar_rule(problem: Problem) -> tuple[Tensor, dict[str, Tensor]]:
    """Scale all columns of a factor alike (Theorem 3)."""
    u_L2r = scalar_solution(problem.H_L2r2r, problem.lam_L2r)
    return u_L2r * problem.target2_L2r, _all_layers("scalar", u_L2r)


def exact_rule(problem: Problem) -> tuple[Tensor, dict[str, Tensor]]:
    """Minimise the bound over u ≥ 0, of which both theorems solve special cases."""
    unit_H_L2r2r, unit_lam_L2r, inverse_L2r = _unit_diagonal(problem.H_L2r2r, problem.lam_L2r)
    u_L2r = nonnegative_least_squares(unit_H_L2r2r, unit_lam_L2r) * inverse_L2r
    return u_L2r * problem.target2_L2r, _all_layers("exact", u_L2r)


def shrink_rule(problem: Problem) -> tuple[Tensor, dict[str, Tensor]]:
    """Scale as `column_rule` does, but enlarge no column.

    Under Adam, whose steps do not shrink with the gradient, a larger column of one factor is a larger learning rate of
    the other.
    """
    scales2_L2r, _ = column_rule(problem)
    return scales2_L2r.clamp(max=1), _all_layers("shrink", scales2_L2r)


def _all_layers(label: str, scales_L2r: Tensor) -> dict[str, Tensor]:
    """Label every layer of a batch alike."""
    return {label: torch.ones_like(scales_L2r[..., 0], dtype=torch.bool)}


# The values of `ScaLoRAConfig.scaling`. A rule is one entry, here or from outside before a configuration names it.
SCALINGS: dict[str, Scaling] = {
    "column": Scaling(column_rule),
    "scalar": Scaling(scalar_rule),
    "exact": Scaling(exact_rule),
    "shrink": Scaling(shrink_rule, initial_norms=3.0),
}


def column_scales(
    gram_left_L2r2r: Tensor, gram_right_L2r2r: Tensor, target2_alpha_L: Tensor, target2_beta_L: Tensor, scaling: str
) -> Scales:
    """Return α and β of every layer, float64, never 0, NaN or infinite, by the rule `SCALINGS[scaling]`.

    A layer whose gradient is zero or not finite keeps all scales at 1.

    Args:
        gram_left_L2r2r, gram_right_L2r2r: as for `normal_system`.
        target2_alpha_L, target2_beta_L: 1 / (L η s²) with the base learning rate η of the right factor for α, and of
            the left factor for β: the squared norm that orthogonal columns are brought to.
        scaling: a name in `SCALINGS`.
    """
    finite_L11 = is_finite(gram_left_L2r2r * gram_right_L2r2r)
    gram_left_L2r2r = torch.where(finite_L11, gram_left_L2r2r, 0)
    gram_right_L2r2r = torch.where(finite_L11, gram_right_L2r2r, 0)
    r = gram_left_L2r2r.shape[-1] // 2
    target2_L2 = torch.stack([target2_alpha_L, target2_beta_L], -1).double()
    target2_L2r = target2_L2[..., None].expand(-1, -1, r).flatten(-2)
    norm2_L2r = _halves(gram_left_L2r2r, gram_right_L2r2r)
    problem = Problem(*normal_system(gram_left_L2r2r, gram_right_L2r2r), norm2_L2r, target2_L2r)

    scales2_L2r, scaled_by = SCALINGS[scaling].rule(problem)
    smallest_L2r = (MIN_COLUMN_NORM * (target2_L2r / norm2_L2r).sqrt()).clamp(max=1)
    scales_L2r = torch.maximum(scales2_L2r.sqrt(), smallest_L2r)
    determined_L2r = problem.H_L2r2r.diagonal(dim1=-2, dim2=-1) > 0
    scales_L2r = torch.where(determined_L2r & (scales_L2r < torch.inf), scales_L2r, 1)
    skipped_L = ~determined_L2r.any(-1)
    scaled_by = {label: mask_L & ~skipped_L for label, mask_L in scaled_by.items()}
    return Scales(scales_L2r[..., :r], scales_L2r[..., r:], skipped_L, scaled_by)
