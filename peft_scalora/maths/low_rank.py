"""Add an adapter's two low-rank products, trained s B A and accumulated u U V, to the output of the base layer.

Shape suffixes, with the factors as PEFT stores them: T tokens, M out_features, N in_features, R adapter rank,
K accumulated columns. Any leading dimensions may stand for T.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def add_low_rank_reference(
    y_TM: Tensor, x_TN: Tensor, A_RN: Tensor, B_MR: Tensor, U_MK: Tensor, V_KN: Tensor, s: float, u: float
) -> Tensor:
    """Return y + s B A x + u U V x by differentiable operations, as the functions below do in fewer passes.

    This form is compiled and traced.
    """
    y_TM = y_TM + F.linear(F.linear(x_TN, A_RN) * s, B_MR)
    return y_TM + F.linear(F.linear(x_TN, V_KN.to(x_TN.dtype)) * u, U_MK.to(x_TN.dtype))


def add_low_rank(
    y_TM: Tensor, x_TN: Tensor, A_RN: Tensor, B_MR: Tensor, U_MK: Tensor, V_KN: Tensor, s: float, u: float
) -> Tensor:
    """Return y + s B A x + u U V x, with gradients for y, x, A and B but none for U and V.

    x, A and B have one dtype, in which the products are taken; U and V are cast to it. The result has the dtype that y
    and the products promote to.
    """
    if torch.jit.is_tracing():
        return add_low_rank_reference(y_TM, x_TN, A_RN, B_MR, U_MK, V_KN, s, u)
    out_TM, _ = _LowRank.apply(_rows(y_TM), _rows(x_TN), None, None, A_RN, B_MR, U_MK, V_KN, s, u)
    return out_TM.view(y_TM.shape)


def linear_plus_low_rank(
    x_TN: Tensor,
    W_MN: Tensor,
    b_M: Tensor | None,
    A_RN: Tensor,
    B_MR: Tensor,
    U_MK: Tensor,
    V_KN: Tensor,
    s: float,
    u: float,
) -> Tensor:
    """Return W x + b + s B A x + u U V x for frozen W and b, with gradients for x, A and B alone.

    All products are added in place: nothing of the size of the output is made twice, forward or backward. x, W, b, A
    and B have one dtype.
    """
    if torch.jit.is_tracing():
        return add_low_rank_reference(F.linear(x_TN, W_MN, b_M), x_TN, A_RN, B_MR, U_MK, V_KN, s, u)
    out_TM, _ = _LowRank.apply(None, _rows(x_TN), W_MN, b_M, A_RN, B_MR, U_MK, V_KN, s, u)
    return out_TM.view(*x_TN.shape[:-1], len(W_MN))


def _add_product(y_TM: Tensor, hidden_TR: Tensor, up_RM: Tensor, in_place: bool) -> Tensor:
    """Return y + hidden up, in one pass over y, the largest tensor here."""
    if y_TM.dtype != hidden_TR.dtype:
        return y_TM + hidden_TR @ up_RM
    return y_TM.addmm_(hidden_TR, up_RM) if in_place else torch.addmm(y_TM, hidden_TR, up_RM)


def _may_overwrite() -> bool:
    """Tell whether intermediate results may be overwritten: under vmap only some of them have the batch dimension."""
    return not torch._C._are_functorch_transforms_active()


def _rows(x_TN: Tensor) -> Tensor:
    """Flatten all leading dimensions into one; there may be none."""
    return x_TN.reshape(-1, x_TN.shape[-1])


def _scaled(x: Tensor, scale: float | Tensor) -> Tensor:
    return x * scale if isinstance(scale, Tensor) or scale != 1.0 else x


class _LowRank(torch.autograd.Function):
    """Compute (y + s B A x + u U V x, s A x), with y = W x + b where it is not given. All tensors are matrices.

    The second is an output so that a gradient of the gradient, which needs it, is right. Neither output is a view:
    autograd lets nobody overwrite a view that was made in here.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(y_TM, x_TN, W_MN, b_M, A_RN, B_MR, U_MK, V_KN, s, u):
        is_own = y_TM is None and _may_overwrite()
        hidden_TR = _scaled(x_TN @ A_RN.mT, s)
        out_TM = F.linear(x_TN, W_MN, b_M) if y_TM is None else y_TM
        out_TM = _add_product(out_TM, hidden_TR, B_MR.mT, in_place=is_own)
        if U_MK.shape[1]:
            hidden_TK = _scaled(x_TN @ V_KN.to(x_TN.dtype).mT, u)
            out_TM = _add_product(out_TM, hidden_TK, U_MK.to(x_TN.dtype).mT, in_place=_may_overwrite())
        return out_TM, hidden_TR

    @staticmethod
    def setup_context(ctx, inputs, output):
        y_TM, *tensors, ctx.s, ctx.u = inputs
        ctx.y_dtype = None if y_TM is None else y_TM.dtype
        ctx.save_for_backward(*tensors, output[1])
        ctx.save_for_forward(*tensors, output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad_y_TM, grad_hidden_TR):
        x_TN, W_MN, _, A_RN, B_MR, U_MK, V_KN, hidden_TR = ctx.saved_tensors
        _, needs_x, _, _, needs_A, needs_B, *_ = ctx.needs_input_grad
        grad_x = grad_A = grad_B = None
        if grad_y_TM is None:  # only a gradient of a gradient gets here
            grad_y_TM = x_TN.new_zeros(len(x_TN), len(B_MR))
        grad_TM = grad_y_TM.to(x_TN.dtype)
        if needs_x or needs_A:
            low_TR = grad_TM @ B_MR
            low_TR = _scaled(low_TR if grad_hidden_TR is None else low_TR + grad_hidden_TR, ctx.s)
        if needs_x:
            may_overwrite = _may_overwrite()
            grad_x = low_TR @ A_RN if W_MN is None else _add_product(grad_TM @ W_MN, low_TR, A_RN, may_overwrite)
            if U_MK.shape[1]:
                low_TK = _scaled(grad_TM @ U_MK.to(x_TN.dtype), ctx.u)
                grad_x = _add_product(grad_x, low_TK, V_KN.to(x_TN.dtype), may_overwrite)
        if needs_A:
            grad_A = low_TR.mT @ x_TN
        if needs_B:
            grad_B = grad_TM.mT @ hidden_TR
        grad_y_TM = None if ctx.y_dtype is None else grad_y_TM.to(ctx.y_dtype)
        return grad_y_TM, grad_x, None, None, grad_A, grad_B, None, None, None, None

    @staticmethod
    def jvp(ctx, dy_TM, dx_TN, dW_MN, db_M, dA_RN, dB_MR, dU_MK, dV_KN, *_):
        x_TN, W_MN, _, A_RN, B_MR, U_MK, V_KN, hidden_TR = ctx.saved_for_forward
        dtype = x_TN.dtype
        dhidden_TR = torch.zeros_like(hidden_TR)
        dout_TM = dhidden_TR.new_zeros(len(x_TN), len(B_MR))
        if dx_TN is not None:
            dhidden_TR = dhidden_TR + dx_TN @ A_RN.mT * ctx.s
            dout_TM = dout_TM + dx_TN @ V_KN.to(dtype).mT * ctx.u @ U_MK.to(dtype).mT
            dout_TM = dout_TM if W_MN is None else dout_TM + dx_TN @ W_MN.mT
        if dA_RN is not None:
            dhidden_TR = dhidden_TR + x_TN @ dA_RN.mT * ctx.s
        if dB_MR is not None:
            dout_TM = dout_TM + hidden_TR @ dB_MR.mT
        if dW_MN is not None:
            dout_TM = dout_TM + x_TN @ dW_MN.mT
        if db_M is not None:
            dout_TM = dout_TM + db_M
        dout_TM = dout_TM + dhidden_TR @ B_MR.mT
        return dout_TM if dy_TM is None else dout_TM + dy_TM, dhidden_TR
