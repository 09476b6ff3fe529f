"""The accumulated change U V of rank K ≤ R: folding into it, and recompressing it.

Shape suffixes: L layers of one shape, M out_features, N in_features, R adapter rank, K accumulated columns.
A product P Q (P of M x K, Q of K x N) is handled through its K x K Gram matrices in float64; nothing M x N is formed.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Eigenvalues of a float64 Gram matrix below this part of the largest are rounding.
GRAM_TOLERANCE = 1e-14


def fold_factors(A_LMR: Tensor, B_LNR: Tensor, alpha_LR: Tensor, beta_LR: Tensor, s: float) -> tuple[Tensor, Tensor]:
    """Factors of the fold s (A Bᵀ - Ã B̃ᵀ) = s A diag(1 - α∘β) Bᵀ: (U_LMR, V_LRN)."""
    return A_LMR * (s * (1 - alpha_LR * beta_LR))[..., None, :], B_LNR.mT


def rounded_fold_factors(
    A_LMR: Tensor, B_LNR: Tensor, new_A_LMR: Tensor, new_B_LNR: Tensor, s: float
) -> tuple[Tensor, Tensor]:
    """The same for factors that scaling has rounded (bfloat16, float16): s [A, -Ã] [B, B̃]ᵀ, of rank 2 R."""
    return s * torch.cat([A_LMR, -new_A_LMR], -1), torch.cat([B_LNR, new_B_LNR], -1).mT


def _gram_spectrum(P_LMK: Tensor, Q_LKN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Singular values (descending) of P Q, and K x K matrices that turn P and Q into its singular vectors.

    With PᵀP = E Λ Eᵀ and Λ^½ Eᵀ (Q Qᵀ) E Λ^½ = F Σ² Fᵀ: P Q = (P E Λ^-½ F) Σ (Σ^-1 Fᵀ Λ^½ Eᵀ Q).
    Returns Σ_LK, left_LKK = E Λ^-½ F and right_LKK = Fᵀ Λ^½ Eᵀ, float64; Σ is nan where P or Q is not finite.
    """
    gram_P_LKK, gram_Q_LKK = P_LMK.mT @ P_LMK, Q_LKN @ Q_LKN.mT
    finite_L11 = (gram_P_LKK + gram_Q_LKK).isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
    # eigh raises on nan, and an adapter that diverged has to be reported, not to stop a batch of healthy ones.
    gram_P_LKK, gram_Q_LKK = torch.where(finite_L11, gram_P_LKK, 0), torch.where(finite_L11, gram_Q_LKK, 0)
    values_LK, E_LKK = torch.linalg.eigh(gram_P_LKK)
    root_LK = torch.where(values_LK > GRAM_TOLERANCE * values_LK[..., -1:], values_LK, 0).sqrt()
    inverse_LK = torch.where(root_LK > 0, 1 / root_LK, 0)
    half_LKK = E_LKK * root_LK[..., None, :]
    sigma2_LK, F_LKK = torch.linalg.eigh(half_LKK.mT @ gram_Q_LKK @ half_LKK)
    sigma_LK, F_LKK = sigma2_LK.flip(-1).clamp(min=0).sqrt(), F_LKK.flip(-1)
    sigma_LK = torch.where(finite_L11[..., 0], sigma_LK, torch.nan)
    return sigma_LK, (E_LKK * inverse_LK[..., None, :]) @ F_LKK, (half_LKK @ F_LKK).mT


def singular_values(P_LMK: Tensor, Q_LKN: Tensor) -> Tensor:
    """Singular values of P Q, descending, float64; those below about 1e-7 of the largest are rounding."""
    return _gram_spectrum(P_LMK.double(), Q_LKN.double())[0]


def truncate(P_LMK: Tensor, Q_LKN: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Best rank-`rank` approximation of P Q as balanced factors (both carry Σ^½), with what it leaves out.

    Returns U_LMR, V_LRN in float32 and the Frobenius norm of the discarded part, discarded_L in float64.
    """
    P_LMK, Q_LKN = P_LMK.double(), Q_LKN.double()
    sigma_LK, left_LKK, right_LKK = _gram_spectrum(P_LMK, Q_LKN)
    kept_LR, discarded_L = sigma_LK[..., :rank], sigma_LK[..., rank:].square().sum(-1).sqrt()
    root_LR = kept_LR.sqrt()
    inverse_LR = torch.where(root_LR > 0, 1 / root_LR, 0)
    U_LMR = P_LMK @ (left_LKK[..., :rank] * root_LR[..., None, :])
    V_LRN = (right_LKK[..., :rank, :] * inverse_LR[..., None]) @ Q_LKN
    return U_LMR.float(), V_LRN.float(), discarded_L


def effective_rank(sigma_LK: Tensor, tol: float) -> Tensor:
    """Number of singular values above `tol` times the largest, per layer (0 for a zero change)."""
    return (sigma_LK > tol * sigma_LK[..., :1]).sum(-1)
