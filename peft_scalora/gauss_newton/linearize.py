"""Gradients of a loss on the linearized network (full Gauss-Newton, arXiv 2510.09378), as functions of tensors.

Notation: f(θ) are the network's outputs at the anchor θ, J = ∂f/∂θ, ℓ the loss of the outputs, H = ∇²ℓ, δ a change of
θ. Parameters and δ are dicts from names to tensors of equal shape. Neither J nor H is formed: one forward pass on
dual numbers gives f and Jδ, one backward pass multiplies by Jᵀ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

VARIANTS = ("gn", "prox_linear")
Tensors = Mapping[str, Tensor]
Forward = Callable[[dict[str, Tensor]], Tensor]
Loss = Callable[[Tensor], Tensor]


def linearized_loss_and_grad(
    forward: Forward, loss: Loss, params: Tensors, delta: Tensors, variant: str = "gn"
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return value and gradient, with respect to δ, of the objective on the network linearized at `params`.

        variant         objective of δ                          gradient
        "gn"            ℓ(f) + ⟨∇ℓ, Jδ⟩ + ½⟨Jδ, H Jδ⟩           Jᵀ(∇ℓ(f) + H(f) Jδ)
        "prox_linear"   ℓ(f + Jδ)                               Jᵀ ∇ℓ(f + Jδ)

    Args:
        forward: maps a dict like `params` to the outputs, one tensor of any shape; runs once.
        loss: maps the outputs to a scalar; convex in them, or "gn" has no minimum. Twice differentiable for "gn".
        params: the anchor θ. Parameters that stay fixed are left out, and bound by `forward`.
        delta: δ of some of `params`; the others are not linearized and get no gradient. Layerwise Gauss-Newton calls
            this once for each layer with the δ of that layer alone.

    Returns:
        The scalar objective and the gradient by name of `delta`, both detached, in the dtype of the parameters.

    Raises:
        ValueError: the variant is unknown. NotImplementedError: an operation of `forward` has no forward-mode rule.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant={variant!r} must be one of {', '.join(map(repr, VARIANTS))}.")
    leaves, outputs, Jd = _outputs_and_tangent(forward, params, delta)
    value, cotangent = (_gn_cotangent if variant == "gn" else _prox_linear_cotangent)(loss, outputs.detach(), Jd)
    return value, _pull_back(outputs, leaves, cotangent)


def ggn_product(forward: Forward, loss: Loss, params: Tensors, vector: Tensors) -> dict[str, Tensor]:
    """Return Jᵀ H J v, the generalized Gauss-Newton matrix at `params` times `vector`.

    Args:
        forward: maps a dict like `params` to the outputs, one tensor of any shape; runs once.
        loss: maps the outputs to a scalar; twice differentiable.
        params: where the matrix is taken. Parameters that stay fixed are left out, and bound by `forward`.
        vector: v for some of `params`; the matrix is that of these alone.

    Returns:
        The product by name of `vector`, detached, in the dtype of the parameters.
    """
    leaves, outputs, Jv = _outputs_and_tangent(forward, params, vector)
    _, _, HJv = _derivatives(loss, outputs.detach(), Jv)
    return _pull_back(outputs, leaves, HJv)


def _outputs_and_tangent(forward: Forward, params: Tensors, delta: Tensors):
    """Return new leaves for the parameters in `delta`, the outputs f with a graph down to them, and Jδ without one."""
    leaves = {name: params[name].detach().requires_grad_() for name in delta}
    with torch.enable_grad(), forward_ad.dual_level(), _HandWrittenTangents():
        duals = {name: forward_ad.make_dual(leaf, delta[name]) for name, leaf in leaves.items()}
        outputs, tangent = forward_ad.unpack_dual(forward({**params, **duals}))
    return leaves, outputs, torch.zeros_like(outputs) if tangent is None else tangent.detach()


_ACTIVATIONS = (torch._C._nn.silu, torch._C._nn.gelu)  # what F.silu and F.gelu come down to


class _HandWrittenTangents(TorchFunctionMode):
    """Mode in which linear layers and activations on dual numbers are computed as one would write them by hand.

    torch multiplies by a tangent of zeros where a weight is frozen, and keeps a graph behind every tangent, through
    which nothing ever goes back.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.linear:
            return _dual_linear(*args, **(kwargs or {}))
        if func in _ACTIVATIONS:
            return _dual_activation(func, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _dual_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x Wᵀ + b with the tangent ẋ Wᵀ + x Ẇᵀ + ḃ, summed over the terms that there are."""
    (x, dx), (W, dW) = forward_ad.unpack_dual(input), forward_ad.unpack_dual(weight)
    b, db = (None, None) if bias is None else forward_ad.unpack_dual(bias)
    y = F.linear(x, W, b)
    with torch.no_grad():
        terms = [F.linear(a, B) for a, B in ((dx, W), (x, dW)) if a is not None and B is not None]
        terms += [] if db is None else [db]
        tangent = sum(terms).expand_as(y) if terms else None
    return y if tangent is None else forward_ad.make_dual(y, tangent)


def _dual_activation(func: Callable[..., Tensor], input: Tensor, **kwargs) -> Tensor:
    """Return φ(x) with the tangent φ'(x) ẋ from the fused kernel, which torch takes only where there is no graph."""
    x, dx = forward_ad.unpack_dual(input)
    y = func(x, **kwargs)
    if dx is None:
        return y
    with torch.no_grad():
        tangent = forward_ad.unpack_dual(func(forward_ad.make_dual(x.detach(), dx.detach()), **kwargs)).tangent
    return forward_ad.make_dual(y, tangent)


def _derivatives(loss: Loss, outputs: Tensor, direction: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return ℓ, ∇ℓ and ∇²ℓ times a direction, at the outputs."""
    leaf = outputs.requires_grad_()
    with torch.enable_grad():
        value = loss(leaf)
        (gradient,) = torch.autograd.grad(value, leaf, create_graph=True)
    if gradient.grad_fn is None:  # a loss linear in the outputs
        return value.detach(), gradient, torch.zeros_like(outputs)
    (product,) = torch.autograd.grad(gradient, leaf, direction, materialize_grads=True)
    return value.detach(), gradient.detach(), product


def _gn_cotangent(loss: Loss, outputs: Tensor, Jd: Tensor) -> tuple[Tensor, Tensor]:
    """Return ℓ + ⟨∇ℓ, Jδ⟩ + ½⟨Jδ, H Jδ⟩ and ∇ℓ + H Jδ."""
    value, gradient, HJd = _derivatives(loss, outputs, Jd)
    flat = Jd.flatten()
    value = value + gradient.flatten() @ flat + 0.5 * (HJd.flatten() @ flat)
    return value, HJd.add_(gradient)


def _prox_linear_cotangent(loss: Loss, outputs: Tensor, Jd: Tensor) -> tuple[Tensor, Tensor]:
    """Return ℓ(f + Jδ) and its gradient in the outputs."""
    leaf = (outputs + Jd).requires_grad_()
    with torch.enable_grad():
        value = loss(leaf)
    (gradient,) = torch.autograd.grad(value, leaf)
    return value.detach(), gradient


def _pull_back(outputs: Tensor, leaves: dict[str, Tensor], cotangent: Tensor) -> dict[str, Tensor]:
    """Return Jᵀ times the cotangent; zero for parameters that the outputs do not depend on."""
    gradients = torch.autograd.grad(outputs, list(leaves.values()), cotangent, materialize_grads=True)
    return dict(zip(leaves, gradients))
