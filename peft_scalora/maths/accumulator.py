"""The accumulated change U V, of K columns in use out of C: folding into it, and recompressing it.

Names and shape suffixes are those of `peft_scalora.maths`. A product P Q (P of M x K, Q of K x N) is handled through
its K x K Gram matrices in float64; nothing M x N is formed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .scaling import gram_matrices, is_finite

# Eigenvalues of a float64 Gram matrix below this part of the largest are rounding.
GRAM_TOLERANCE = 1e-14
# Numbers that writing a weight may hold beside it (16 MiB in float32).
SUM_WORKSPACE = 2**22


def fold_factors(left_LMr: Tensor, right_LrN: Tensor, folded_Lr: Tensor, s: float) -> tuple[Tensor, Tensor]:
    """Return U_LMr and V_LrN of the fold s left right - s (left α) (β right) = s left diag(1 - α∘β) right.

    Args:
        folded_Lr: 1 - α∘β.
    """
    return left_LMr * (s * folded_Lr)[..., None, :], right_LrN


def rounded_fold_factors(
    left_LMr: Tensor, right_LrN: Tensor, new_left_LMr: Tensor, new_right_LrN: Tensor, s: float
) -> tuple[Tensor, Tensor]:
    """Return U_LMK and V_LKN, K = 2r, of the fold s left right - s new_left new_right.

    For new factors that rounding has moved from the scaled ones (bfloat16, float16).
    """
    return s * torch.cat([left_LMr, -new_left_LMr], -1), torch.cat([right_LrN, new_right_LrN], -2)


def _spectrum(gram_P_LKK: Tensor, gram_Q_LKK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the singular values (ascending) of P Q, and K x K matrices that turn P and Q into its singular vectors.

    With PᵀP = E Λ Eᵀ and Λ^½ Eᵀ (Q Qᵀ) E Λ^½ = F Σ² Fᵀ: P Q = (P E Λ^-½ F) Σ (Σ^-1 Fᵀ Λ^½ Eᵀ Q).
    Returns Σ_LK, left_LKK = E Λ^-½ F and right_LKK = Fᵀ Λ^½ Eᵀ; Σ is nan where P or Q is not finite.
    """
    finite_L11 = is_finite(gram_P_LKK + gram_Q_LKK)
    # eigh raises on nan, and an adapter that diverged has to be reported, not to stop a batch of healthy ones.
    gram_P_LKK, gram_Q_LKK = torch.where(finite_L11, gram_P_LKK, 0), torch.where(finite_L11, gram_Q_LKK, 0)
    values_LK, E_LKK = torch.linalg.eigh(gram_P_LKK)
    root_LK = torch.where(values_LK > GRAM_TOLERANCE * values_LK[..., -1:], values_LK, 0).sqrt()
    half_LKK = E_LKK * root_LK[..., None, :]
    sigma2_LK, F_LKK = torch.linalg.eigh(half_LKK.mT @ gram_Q_LKK @ half_LKK)
    sigma_LK = torch.where(finite_L11[..., 0], sigma2_LK.clamp(min=0).sqrt(), torch.nan)
    return sigma_LK, (E_LKK * _inverse(root_LK)[..., None, :]) @ F_LKK, (half_LKK @ F_LKK).mT


def _inverse(x: Tensor) -> Tensor:
    return torch.where(x > 0, 1 / x, 0)


def singular_values(P_LMK: Tensor, Q_LKN: Tensor) -> Tensor:
    """Return the singular values of P Q, descending, float64; those below about 1e-7 of the largest are rounding."""
    return _spectrum(*gram_matrices(P_LMK, Q_LKN))[0].flip(-1)


def truncation(gram_P_LKK: Tensor, gram_Q_LKK: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the best rank-`rank` approximation of P Q as balanced factors P left and right Q (both carry Σ^½).

    Returns:
        left_LKC and right_LCK, of C = min(rank, K) columns, and the Frobenius norm of what is left out, discarded_L;
        all float64.
    """
    sigma_LK, left_LKK, right_LKK = _spectrum(gram_P_LKK, gram_Q_LKK)
    rank = min(rank, sigma_LK.shape[-1])
    root_LC, discarded_LK = sigma_LK[..., -rank:].sqrt(), sigma_LK[..., :-rank]
    left_LKC = left_LKK[..., -rank:] * root_LC[..., None, :]
    right_LCK = right_LKK[..., -rank:, :] * _inverse(root_LC)[..., None]
    return left_LKC, right_LCK, discarded_LK.square().sum(-1).sqrt()


def truncate(P_LMK: Tensor, Q_LKN: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return U_LMC and V_LCN, float32, of the best approximation of P Q, and the norm of what it leaves out."""
    left_LKC, right_LCK, discarded_L = truncation(*gram_matrices(P_LMK, Q_LKN), rank)
    return (P_LMK.double() @ left_LKC).float(), (right_LCK @ Q_LKN.double()).float(), discarded_L


def effective_rank(sigma_LK: Tensor, tol: float) -> Tensor:
    """Return the number of singular values above `tol` times the largest, per layer (0 for a zero change)."""
    return (sigma_LK > tol * sigma_LK[..., :1]).sum(-1)


def write_sum(out_MN: Tensor, base_MN: Tensor, U_MK: Tensor, V_KN: Tensor) -> None:
    """Write base + U V into `out`, a few rows at a time, summed in float32 or better and rounded once.

    `base` may be on another device than the others.
    """
    dtype = torch.promote_types(out_MN.dtype, torch.float32)
    U_MK, V_KN = U_MK.to(dtype), V_KN.to(dtype)
    rows = max(1, SUM_WORKSPACE // out_MN.shape[1])
    for out, base, U in zip(out_MN.split(rows), base_MN.split(rows), U_MK.split(rows)):
        out.copy_(torch.addmm(base.to(out.device, dtype), U, V_KN))
