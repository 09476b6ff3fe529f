"""Carrying optimizer state through a rescaling.

∂loss/∂Ã = s G B̃ = (∂loss/∂A) diag(β): the gradient history of a factor is scaled by the *other* factor's scales
(Lemmas 3.3, 3.6). A state that is linear in past gradients is multiplied by that scale, one that holds their squares by
its square, one that holds ratios of both not at all, and a change of the factor that is yet to come by its inverse.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

# Optimizer class name -> state name -> power of the scale, by name because not all of them are torch's.
_ADAM = {"exp_avg": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2}
RULES: dict[str, dict[str, int]] = {
    "Adam": _ADAM,
    "AdamW": _ADAM,
    "NAdam": _ADAM,
    "RAdam": _ADAM,
    "Adamax": {"exp_avg": 1, "exp_inf": 1},
    "Adagrad": {"sum": 2},
    "RMSprop": {"square_avg": 2, "grad_avg": 1, "momentum_buffer": 0},
    "SGD": {"momentum_buffer": 1},
    "Muon": {"momentum_buffer": 1},
    "Lion": {"exp_avg": 1},
    # DeepSpeed's own, with torch's names of the states.
    "DeepSpeedCPUAdam": _ADAM,
    "FusedAdam": _ADAM,
}
_registered: dict[type[torch.optim.Optimizer], dict[str, int]] = {}
# bitsandbytes names its states state1 and state2 whatever the optimizer, and says which one it is.
_BITSANDBYTES_RULES: dict[str, dict[str, int]] = {
    "adam": {"state1": 1, "state2": 2},
    "momentum": {"state1": 1},
    "lion": {"state1": 1},
    "rmsprop": {"state1": 2},
    "adagrad": {"state1": 2},
}
# SAM's copies of parameters and gradients, written anew in every step before they are read.
TEMPORARY_STATES = {"old_p", "old_g", "e_w"}
_BITSANDBYTES_BLOCK = 256
_BITSANDBYTES_AUXILIARY = {"qmap1", "qmap2", "absmax1", "absmax2", "max1", "max2", "new_max1", "new_max2", "unorm_vec"}


def register_optimizer(cls: type[torch.optim.Optimizer], powers: Mapping[str, int]) -> None:
    """Say how a rescaling carries the state that an optimizer class, and its subclasses, keep of a parameter.

    A rescaling multiplies the gradients of a factor by the other factor's scales. The optimizer's history of gradients
    has to follow, so that training goes on as if they had always been scaled.

    Args:
        cls: the optimizer's class. What is registered comes before the rules that the package has by itself.
        powers: of every state with one number for each of the parameter's, its name in `optimizer.state[param]` and the
            power of the scale that it is multiplied by. 1 for an average of gradients, 2 for one of their squares, 0
            for what does not depend on their size, -1 for a change of the parameter that is yet to come. Counters
            need no entry.

    Raises:
        TypeError: cls is not an optimizer class, or powers does not map names to whole numbers.

    Example:
        `register_optimizer(AdEMAMix, {"exp_avg_fast": 1, "exp_avg_slow": 1, "exp_avg_sq": 2})`
    """
    if not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)):
        raise TypeError(f"cls={cls!r} must be a subclass of torch.optim.Optimizer.")
    if not all(isinstance(name, str) and type(power) is int for name, power in dict(powers).items()):
        raise TypeError(f"powers={powers!r} must map names of states to whole numbers, as {{'exp_avg': 1}} does.")
    _registered[cls] = dict(powers)


def rule_for(optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Return state name -> power of the scale; empty for an optimizer without a rule."""
    classes = type(optimizer).__mro__
    for cls in classes:
        if cls in _registered:
            return _registered[cls]
    if hasattr(optimizer, "optimizer_name"):  # bitsandbytes
        return _BITSANDBYTES_RULES.get(optimizer.optimizer_name, {})
    return next((RULES[cls.__name__] for cls in classes if cls.__name__ in RULES), {})


class OptimizerState(NamedTuple):
    """Rule of an optimizer and its state (parameter -> state name -> state), as a rescaling uses them."""

    rule: dict[str, int]
    state: Mapping[Tensor, dict[str, Tensor]]

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer | None) -> OptimizerState:
        return cls({}, {}) if optimizer is None else cls(rule_for(optimizer), optimizer.state)

    def carried(self, param: Tensor) -> dict[str, int]:
        """Return state name -> power of the scale, for the states that `param` has by now."""
        held = self.state.get(param, {})
        return {name: power for name, power in self.rule.items() if power and isinstance(held.get(name), Tensor)}


def _has_elements(value) -> bool:
    """Tell whether a state holds more than a counter, in whatever shape or container."""
    if isinstance(value, Tensor):
        return value.numel() > 1
    if isinstance(value, dict):
        value = list(value.values())
    return isinstance(value, (list, tuple)) and any(map(_has_elements, value))


def _is_unknown(name: str, value, rule: Mapping[str, int], param: Tensor) -> bool:
    """Tell whether a state has no rule, or not the size that its rule is for, as GaLore's projected moments of Adam."""
    if not _has_elements(value) or name in TEMPORARY_STATES or (name in _BITSANDBYTES_AUXILIARY and rule):
        return False
    return name not in rule or not isinstance(value, Tensor) or value.numel() != param.numel()


def check_state(optimizer: torch.optim.Optimizer, *params: Tensor) -> None:
    """Refuse an optimizer that keeps state of one of `params`, beyond counters, for which there is no rule.

    Raises:
        TypeError: names the optimizer, the state, and the optimizers that work.
    """
    if any(cls.__name__ == "ZeroRedundancyOptimizer" for cls in type(optimizer).__mro__):
        raise TypeError(
            "ScaLoRA does not support optimizer ZeroRedundancyOptimizer: each rank steps, and would rescale, only its "
            "share of the adapters. Adapters are small: use the plain optimizer on every rank."
        )
    rule = rule_for(optimizer)
    # An optimizer without a rule may keep the state of all parameters with the first one, as LBFGS does.
    states = {p: optimizer.state.get(p, {}) for p in params} if rule else optimizer.state
    unknown: dict[str, None] = {}  # a set that keeps the order
    for param, state in states.items():
        unknown |= dict.fromkeys(name for name in state if _is_unknown(name, state[name], rule, param))
    if unknown:
        raise TypeError(
            f"ScaLoRA cannot carry the state {', '.join(map(repr, unknown))} of optimizer "
            f"{type(optimizer).__name__} through a rescaling. Optimizers that work: {', '.join(_known_names())}, and "
            f"bitsandbytes' {', '.join(sorted(_BITSANDBYTES_RULES))} in 32 and 8 bit. Use one of these, say how its "
            "state is carried with peft_scalora.register_optimizer, or set a scaling_interval longer than the training "
            "to keep plain LoRA."
        )


def _known_names() -> list[str]:
    """List the classes that have a rule, by name."""
    return sorted({*RULES, *(cls.__name__ for cls in _registered)})


def multiply(tensors_KL: list[list[Tensor]], scale_KLr: Tensor, dim: int) -> None:
    """Multiply K kinds of matrices of L layers in place, each by its scales along `dim` (0 rows, 1 columns).

    Kind k of layer l is multiplied by scale_KLr[k, l]. All have one shape; convolution kernels count as matrices of
    their flattened trailing dimensions. The product is taken in float32 or better and rounded once.
    """
    tensors = [tensor.detach() for kind in tensors_KL for tensor in kind]
    stacked = torch.stack(tensors)
    shape = [len(tensors)] + [1] * (stacked.dim() - 1)
    shape[1 + dim] = scale_KLr.shape[-1]
    stacked *= scale_KLr.reshape(shape)  # in float32 or better, rounded once
    torch._foreach_copy_(tensors, list(stacked.unbind()))


def carried_scales(powers: tuple[int, ...], own_Lr: Tensor, other_Lr: Tensor) -> Tensor:
    """Return the scales (K, L, r) of a factor, of its gradient and of its carried states, which have these powers."""
    by_power = {power: other_Lr if power == 1 else other_Lr**power for power in {1, *powers}}
    return torch.stack([own_Lr, other_Lr, *(by_power[power] for power in powers)])


def carry(optimizer: OptimizerState, params: list[Tensor], scale_KLr: Tensor, dim: int) -> None:
    """Multiply factors of one shape, their gradients and their carried states by their `carried_scales`.

    All factors have the same carried states.
    """
    kinds = [params, [p.grad for p in params]]
    dense = [0, 1]
    for k, name in enumerate(optimizer.carried(params[0]), start=2):
        states = [optimizer.state[p] for p in params]
        if states[0][name].dtype == torch.uint8:
            _multiply_quantized(states, name, scale_KLr[k], dim)
        else:
            kinds.append([state[name] for state in states])
            dense.append(k)
    multiply(kinds, scale_KLr if len(dense) == len(scale_KLr) else torch.stack([scale_KLr[k] for k in dense]), dim)


def _multiply_quantized(states: list[dict], name: str, scale_Lr: Tensor, dim: int) -> None:
    """Multiply bitsandbytes' blockwise 8-bit states: to float32, multiply, back with new block maxima."""
    from bitsandbytes.functional import dequantize_blockwise, quantize_blockwise

    number = name.removeprefix("state")
    code, absmax = f"qmap{number}", f"absmax{number}"
    values = [
        dequantize_blockwise(s[name], absmax=s[absmax], code=s[code], blocksize=_BITSANDBYTES_BLOCK) for s in states
    ]
    multiply([values], scale_Lr[None], dim)
    # Quantizing again is not the identity: what is not scaled keeps its bits.
    for state, value, scaled in zip(states, values, (scale_Lr != 1).any(-1)):
        quantized, quant_state = quantize_blockwise(value, code=state[code], blocksize=_BITSANDBYTES_BLOCK)
        state[name].copy_(torch.where(scaled, quantized, state[name]))
        state[absmax].copy_(torch.where(scaled, quant_state.absmax, state[absmax]))
