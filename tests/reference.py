"""ScaLoRA (arXiv 2510.23818) transcribed literally in float64 NumPy with a dense gradient: the oracle for the tests.

Shapes and names are the paper's: A is (m, r) (PEFT's `lora_B.weight`), B is (n, r) (PEFT's `lora_A.weight` transposed),
G is (m, n) = dloss/dW, s is PEFT's `scaling`, L the smoothness constant, eta the learning rate, W = W_base + s A B^T.
A column whose term in the bound vanishes (H_ii = 0) is called undetermined: the bound says nothing about its scale.
"""

import numpy as np
from scipy.optimize import nnls

RCOND = 1e-10  # relative eigenvalue of the Jacobi-scaled H below which a direction counts as null
SIGN_TOLERANCE = 1e-9  # relative size of a negative u_i that is taken for rounding


def update_directions(A, B, G):
    """List of the 2r matrices (m, n) a_i a_i^T G, then G b_i b_i^T: one gradient step changes W along them."""
    r = A.shape[1]
    left = [np.outer(A[:, i], A[:, i]) @ G for i in range(r)]
    right = [G @ np.outer(B[:, i], B[:, i]) for i in range(r)]
    return left + right


def normal_system(A, B, G):
    """H (2r, 2r) and lam (2r,) of the bound 0.5 u^T H u - lam^T u: H_ij = <Z_i, Z_j>, lam_i = <Z_i, G> (Theorem 5)."""
    Z = update_directions(A, B, G)
    H = np.array([[np.sum(Zi * Zj) for Zj in Z] for Zi in Z])
    lam = np.array([np.sum(Zi * G) for Zi in Z])
    return H, lam


def least_squares(A, B, G):
    """Minimiser u (2r,) of the bound without u >= 0; nan where undetermined (Theorem 5).

    Where it is not unique, the one with the smallest norm of v_i = u_i sqrt(H_ii), so that the choice does not depend
    on the sizes of the columns.
    """
    H, lam = normal_system(A, B, G)
    scale = np.sqrt(np.diag(H))
    known = scale > 0
    u = np.full(len(lam), np.nan)
    if known.any():
        scale = scale[known]
        unit_diagonal = H[np.ix_(known, known)] / np.outer(scale, scale)
        v = np.linalg.lstsq(unit_diagonal, lam[known] / scale, rcond=RCOND)[0]
        u[known] = v / scale
    return u


def scales_from(u, L, eta, s):
    """alpha, beta (r,) each from u = [alpha^2; beta^2] L eta s^2; undetermined entries (nan) keep scale 1."""
    scales = np.where(np.isnan(u), 1.0, np.sqrt(u / (L * eta * s**2)))
    alpha, beta = np.split(scales, 2)
    return alpha, beta


def column_scaling(A, B, G, L, eta, s):
    """Column-wise alpha, beta (r,) each, or None where the unconstrained minimiser is not >= 0 (Theorem 5)."""
    u = least_squares(A, B, G)
    H, _ = normal_system(A, B, G)
    v = (u * np.sqrt(np.diag(H)))[~np.isnan(u)]
    if v.size and v.min() < -SIGN_TOLERANCE * np.abs(v).max():
        return None
    return scales_from(np.where(np.isnan(u), u, np.maximum(u, 0.0)), L, eta, s)


def scalar_scaling(A, B, G, L, eta, s):
    """alpha = x 1 and beta = y 1, (r,) each, that minimise the bound over x^2, y^2 >= 0 (Theorem 3)."""
    r = A.shape[1]
    ZA = A @ A.T @ G
    ZB = G @ B @ B.T
    h11, h22, h12 = np.sum(ZA * ZA), np.sum(ZB * ZB), np.sum(ZA * ZB)
    lam1, lam2 = np.sum(ZA * G), np.sum(ZB * G)
    unit = L * eta * s**2

    if h11 == 0 and h22 == 0:
        x2, y2 = 1.0, 1.0
    elif h11 == 0:
        x2, y2 = 1.0, lam2 / h22 / unit
    elif h22 == 0:
        x2, y2 = lam1 / h11 / unit, 1.0
    else:
        cosine = h12 / np.sqrt(h11 * h22)
        CA = lam1 * h22 - lam2 * h12
        CB = lam2 * h11 - lam1 * h12
        C = h11 * h22 - h12**2
        if 1 - cosine <= RCOND * (1 + cosine):
            # Collinear: CA = CB = C = 0. Only x^2 sqrt(h11) + y^2 sqrt(h22) is determined; equal halves have the
            # smallest norm. Tested first because the signs of CA and CB are then rounding noise.
            half = (lam1 / np.sqrt(h11) + lam2 / np.sqrt(h22)) / (2 * (1 + cosine))
            x2, y2 = half / np.sqrt(h11) / unit, half / np.sqrt(h22) / unit
        elif CA > 0 and CB <= 0:
            x2, y2 = lam1 / h11 / unit, 0.0
        elif CA <= 0 and CB > 0:
            x2, y2 = 0.0, lam2 / h22 / unit
        else:
            x2, y2 = CA / C / unit, CB / C / unit
    return np.full(r, np.sqrt(x2)), np.full(r, np.sqrt(y2))


def exact_scaling(A, B, G, L, eta, s):
    """Column-wise alpha, beta (r,) each, minimising the bound ||sum_i u_i Z_i - G||_F over u >= 0; not in the paper."""
    Z = np.stack([Zi.ravel() for Zi in update_directions(A, B, G)], axis=1)
    norms = np.linalg.norm(Z, axis=0)
    known = norms > 0
    u = np.full(Z.shape[1], np.nan)
    if known.any():
        # nnls stops at an absolute tolerance, so the right-hand side is given unit norm as well.
        size = np.linalg.norm(G)
        v, _ = nnls(Z[:, known] / norms[known], G.ravel() / size)
        u[known] = v * size / norms[known]
    return scales_from(u, L, eta, s)


def upper_bound(alpha, beta, A, B, G, L, eta, s):
    """L times the bound on the loss change: 0.5 u^T H u - lam^T u at u = [alpha^2; beta^2] L eta s^2 (Theorem 5)."""
    H, lam = normal_system(A, B, G)
    u = np.concatenate([alpha**2, beta**2]) * (L * eta * s**2)
    return float(0.5 * np.sum(H * np.outer(u, u)) - np.sum(lam * u))


def fold(A, B, alpha, beta, s):
    """What the base weight gains (m, n) so that the model does not change: s (A B^T - A~ B~^T)."""
    A_scaled = A @ np.diag(alpha)
    B_scaled = B @ np.diag(beta)
    return s * (A @ B.T - A_scaled @ B_scaled.T)


def transport(grad_A, grad_B, first_A, first_B, second_A, second_B, alpha, beta):
    """Gradients and moments of A (m, r) and B (n, r) at the scaled point, in the order given (Lemmas 3.3 / 3.6).

    Crosswise: dloss/dA~ = s G B~ = (dloss/dA) diag(beta), so A's follow beta and B's follow alpha.
    """
    by_alpha, by_beta = np.diag(alpha), np.diag(beta)
    return (
        grad_A @ by_beta,
        grad_B @ by_alpha,
        first_A @ by_beta,
        first_B @ by_alpha,
        second_A @ by_beta**2,
        second_B @ by_alpha**2,
    )


class ReferenceScaLoRA:
    """ScaLoRA with Adam on one layer: W (m, n) base weight, A (m, r), B (n, r), `grad` maps the weight to G (m, n).

    Step t = 1, 2, ... takes the gradient, rescales if t % interval == 0 (fold into W, scale A and B, transport the
    gradient and the moments), then updates with Adam and decoupled weight decay. `L` and `eta` set the scaling, where
    `eta` is the base learning rate; `step(lr)` takes a scheduled one. After a rescaling `alpha` and `beta` hold its
    scales and `used` the rule that gave them ("column", "scalar" or "exact").
    """

    def __init__(
        self, W, A, B, grad, *, s, L, eta, mode="column", interval=1, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0
    ):
        if mode not in ("column", "scalar", "exact"):
            raise ValueError(f"mode must be 'column', 'scalar' or 'exact', got {mode!r}")
        self.W_folded, self.A, self.B = (np.array(X, dtype=np.float64) for X in (W, A, B))
        self.grad, self.s, self.L, self.eta = grad, s, L, eta
        self.mode, self.interval = mode, interval
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay
        self.first_A, self.second_A = np.zeros_like(self.A), np.zeros_like(self.A)
        self.first_B, self.second_B = np.zeros_like(self.B), np.zeros_like(self.B)
        self.t = 0
        self.alpha = self.beta = self.used = None

    @property
    def weight(self):
        """The layer's weight (m, n), W_folded + s A B^T."""
        return self.W_folded + self.s * self.A @ self.B.T

    def scaling(self, G):
        """alpha, beta (r,) each and the rule that gave them; "column" is Theorem 5 with Theorem 3 as its fallback."""
        problem = (self.A, self.B, G, self.L, self.eta, self.s)
        if self.mode == "exact":
            return *exact_scaling(*problem), "exact"
        if self.mode == "column":
            scales = column_scaling(*problem)
            if scales is not None:
                return *scales, "column"
        return *scalar_scaling(*problem), "scalar"

    def adam(self, X, grad, first, second, lr):
        """New parameter, first and second moment, all of the shape of X (Adam, bias-corrected, decoupled decay)."""
        beta1, beta2 = self.betas
        X = X * (1 - lr * self.weight_decay)
        first = beta1 * first + (1 - beta1) * grad
        second = beta2 * second + (1 - beta2) * grad**2
        first_hat = first / (1 - beta1**self.t)
        second_hat = second / (1 - beta2**self.t)
        return X - lr * first_hat / (np.sqrt(second_hat) + self.eps), first, second

    def step(self, lr=None):
        """One optimizer step in place, with learning rate `lr` (`eta` where not given)."""
        lr = self.eta if lr is None else lr
        self.t += 1
        G = self.grad(self.weight)
        grad_A = self.s * G @ self.B
        grad_B = self.s * G.T @ self.A
        if self.t % self.interval == 0:
            self.alpha, self.beta, self.used = self.scaling(G)
            self.W_folded = self.W_folded + fold(self.A, self.B, self.alpha, self.beta, self.s)
            self.A = self.A @ np.diag(self.alpha)
            self.B = self.B @ np.diag(self.beta)
            grad_A, grad_B, self.first_A, self.first_B, self.second_A, self.second_B = transport(
                grad_A, grad_B, self.first_A, self.first_B, self.second_A, self.second_B, self.alpha, self.beta
            )
        self.A, self.first_A, self.second_A = self.adam(self.A, grad_A, self.first_A, self.second_A, lr)
        self.B, self.first_B, self.second_B = self.adam(self.B, grad_B, self.first_B, self.second_B, lr)


def singular_rank(M, tol):
    """Number of singular values of M (m, n) above tol times the largest; 0 for a zero matrix."""
    values = np.linalg.svd(M, compute_uv=False)
    return int(np.sum(values > tol * values[0])) if values.size else 0
