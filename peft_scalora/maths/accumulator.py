"""The accumulated change U V of rank K ≤ R: folding into it, and recompressing it.

Shape suffixes: L layers of one shape, M out_features, N in_features, R adapter rank, K accumulated columns.
A product P Q (P of M x K, Q of K x N) is handled through its K x K Gram matrices in float64; nothing M x N is formed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .scaling import gram_matrices, is_finite

# Eigenvalues of a float64 Gram matrix below this part of the largest are rounding.
GRAM_TOLERANCE = 1e-14
# Numbers that writing a weight may hold beside it (16 MiB in float32).
SUM_WORKSPACE = 2**22


def fold_factors(A_LMR: Tensor, B_LRN: Tensor, folded_LR: Tensor, s: float) -> tuple[Tensor, Tensor]:
    """Factors of the fold s (A B - Ã B̃) = s A diag(1 - α∘β) B: (U_LMR, V_LRN), given folded = 1 - α∘β.

    B is the paper's B transposed, as PEFT stores it.
    """
    return A_LMR * (s * folded_LR)[..., None, :], B_LRN


def rounded_fold_factors(
    A_LMR: Tensor, B_LRN: Tensor, new_A_LMR: Tensor, new_B_LRN: Tensor, s: float
) -> tuple[Tensor, Tensor]:
    """The same for factors that scaling has rounded (bfloat16, float16): s [A, -Ã] [B; B̃], of rank 2 R."""
    return s * torch.cat([A_LMR, -new_A_LMR], -1), torch.cat([B_LRN, new_B_LRN], -2)


def _spectrum(gram_P_LKK: Tensor, gram_Q_LKK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Singular values (ascending) of P Q, and K x K matrices that turn P and Q into its singular vectors.

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
    """Singular values of P Q, descending, float64; those below about 1e-7 of the largest are rounding."""
    return _spectrum(*gram_matrices(P_LMK, Q_LKN))[0].flip(-1)


def truncation(gram_P_LKK: Tensor, gram_Q_LKK: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best rank-`rank` approximation of P Q as balanced factors P left and right Q (both carry Σ^½).

    Returns left_LKR, right_LRK and the Frobenius norm of what is left out, discarded_L; all float64.
    """
    sigma_LK, left_LKK, right_LKK = _spectrum(gram_P_LKK, gram_Q_LKK)
    rank = min(rank, sigma_LK.shape[-1])
    root_LR, discarded_LK = sigma_LK[..., -rank:].sqrt(), sigma_LK[..., :-rank]
    left_LKR = left_LKK[..., -rank:] * root_LR[..., None, :]
    right_LRK = right_LKK[..., -rank:, :] * _inverse(root_LR)[..., None]
    return left_LKR, right_LRK, discarded_LK.square().sum(-1).sqrt()


def truncate(P_LMK: Tensor, Q_LKN: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """U_LMR and V_LRN, float32, of the best approximation of P Q, and the norm of what it leaves out."""
    left_LKR, right_LRK, discarded_L = truncation(*gram_matrices(P_LMK, Q_LKN), rank)
    return (P_LMK.double() @ left_LKR).float(), (right_LRK @ Q_LKN.double()).float(), discarded_L


def effective_rank(sigma_LK: Tensor, tol: float) -> Tensor:
    """Number of singular values above `tol` times the largest, per layer (0 for a zero change)."""
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
