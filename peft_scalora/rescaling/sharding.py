"""Factors of which a process holds only a part: FSDP2 and DeepSpeed ZeRO-1, 2 and 3.

A rescaling works on whole copies of the factors, their gradients and their optimizer state, (out + in) r numbers each,
assembled for it and written back into the parts. Every rank computes the same scales from the same bits; nothing of the
size of a weight is sent.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .moments import OptimizerState

# Set to 1 to compare the adapters of all ranks after every rescaling.
CHECK_RANKS = "PEFT_SCALORA_CHECK_RANKS"


def is_sharded(param: Tensor) -> bool:
    return hasattr(param, "full_tensor") or is_zero(param)


def is_zero(param: Tensor) -> bool:
    """Tell whether a ZeRO optimizer of DeepSpeed holds the parameter."""
    return hasattr(param, "ds_id") or getattr(param, "_dp_group", None) is not None


def has_gradients(lora_B: Tensor, lora_A: Tensor) -> bool:
    """Tell whether a step would move both factors; DeepSpeed keeps their gradients to itself."""
    return (lora_B.grad is not None or is_zero(lora_B)) and (lora_A.grad is not None or is_zero(lora_A))


def whole_value(param: Tensor) -> Tensor:
    """Return the whole value of a parameter of which this process may hold a part."""
    if is_zero(param):
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(param).detach()
    return param.detach().full_tensor() if is_sharded(param) else param.detach()


class FullyShardedFactor:
    """Whole copy of a DTensor, its gradient and state."""

    def __init__(self, param: Tensor, optimizer: OptimizerState):
        self.whole = nn.Parameter(whole_value(param))
        self.whole.grad = param.grad.full_tensor()
        sharded = {name: optimizer.state[param][name] for name in optimizer.carried(param)}
        self.state = {name: state.full_tensor() for name, state in sharded.items()}
        self.pairs = [(param.detach(), self.whole), (param.grad, self.whole.grad)]
        self.pairs += [(sharded[name], self.state[name]) for name in sharded]

    def write(self) -> None:
        from torch.distributed.tensor import DTensor, Replicate

        for sharded, whole in self.pairs:
            mesh = sharded.device_mesh
            replicated = DTensor.from_local(whole.detach(), mesh, [Replicate()] * mesh.ndim)
            sharded.to_local().copy_(replicated.redistribute(mesh, sharded.placements).to_local())


class ZeroFactor:
    """Whole float32 copy of a parameter that DeepSpeed holds, its gradient and state."""

    def __init__(self, param: Tensor, optimizer: OptimizerState):
        from deepspeed.utils import safe_get_full_grad, safe_get_full_optimizer_state

        self.param = param
        self.whole = nn.Parameter(whole_value(param).clone())
        self.whole.grad = safe_get_full_grad(param).detach().to(self.whole.dtype, copy=True)
        self.state = {name: safe_get_full_optimizer_state(param, name).clone() for name in optimizer.rule}

    def write(self) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_grad, safe_set_full_optimizer_state

        safe_set_full_fp32_param(self.param, self.whole.detach())
        safe_set_full_grad(self.param, self.whole.grad)
        for name, state in self.state.items():
            safe_set_full_optimizer_state(self.param, state, name)
        if not hasattr(self.param, "ds_id"):  # ZeRO-1 and 2 keep the low-precision parameter whole beside it
            self.param.data.copy_(self.whole)


def assemble(params: Iterable[Tensor], optimizer: OptimizerState) -> tuple[list, OptimizerState]:
    """Return whole copies of sharded parameters, in their order, and the optimizer state of these copies."""
    factors = [(ZeroFactor if is_zero(param) else FullyShardedFactor)(param, optimizer) for param in params]
    return factors, OptimizerState(optimizer.rule, {factor.whole: factor.state for factor in factors})


def wire_deepspeed(before_step) -> None:
    """Call `before_step(engine)` before every optimizer step of every DeepSpeed engine.

    The hook on torch's optimizers is of no use there: DeepSpeed steps one flat partition of all parameters.
    """
    from deepspeed.runtime.engine import DeepSpeedEngine

    original = DeepSpeedEngine._take_model_step  # runs at the boundary of accumulation only, with reduced gradients
    if getattr(original, "rescales", False):
        return

    def take_model_step(engine, *args, **kwargs):
        before_step(engine)
        return original(engine, *args, **kwargs)

    take_model_step.rescales = True  # type: ignore[attr-defined]
    DeepSpeedEngine._take_model_step = take_model_step


def check_ranks(named: Iterable[tuple[str, Tensor]]) -> None:
    """Check that all ranks hold the same bits, if PEFT_SCALORA_CHECK_RANKS=1.

    Raises:
        RuntimeError: names the tensor that differs.
    """
    if os.environ.get(CHECK_RANKS) != "1" or not (dist.is_available() and dist.is_initialized()):
        return
    tensors = dict(named)
    sums = []
    for tensor in tensors.values():
        bits = tensor.detach().contiguous().view(torch.uint8).flatten().long()
        weights = torch.arange(1, bits.numel() + 1, device=bits.device) % 65521
        sums.append((bits * weights).sum())
    mine = torch.stack(sums)
    first = mine.clone()
    dist.broadcast(first, src=0)
    different = [name for name, ours, theirs in zip(tensors, mine.tolist(), first.tolist()) if ours != theirs]
    if different:
        raise RuntimeError(
            f"After a rescaling rank {dist.get_rank()} differs from rank 0 in {different[0]} and {len(different) - 1} "
            "other tensors: were the gradients reduced, and all ranks started from the same adapter?"
        )
