"""Measure hidden states and their gradients at each depth while a model trains."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .blocks import block_lists, norm_gain
from .residual import ResidualEnd, residual_ends


@dataclass
class DepthProfile:
    """Hold figures of one forward and backward pass by depth; entry 0 is the input of the first block.

    Attributes:
        forward_pass: which training pass it is, from 1.
        mean_abs: mean absolute activation, MA(X_d).
        variance: over the features, mean over the tokens.
        rms: ‖X_d‖_F / sqrt(nd) for n tokens and d features.
        gradient_norm: of the loss by X_d; empty until the backward pass has run.
    """

    forward_pass: int
    mean_abs: list[float] = field(default_factory=list)
    variance: list[float] = field(default_factory=list)
    rms: list[float] = field(default_factory=list)
    gradient_norm: list[float] = field(default_factory=list)

    def growth(self) -> float:
        """Return the mean absolute activation of the last block over that of the first block's input."""
        return self.mean_abs[-1] / self.mean_abs[0]


class HiddenStateProbe:
    """Record a `DepthProfile` of every `every`-th training pass of a model, by hooks that leave the model as it is.

        with HiddenStateProbe(model, every=10) as probe:
            trainer.train()
        probe.plot("hidden_states.png")

    Passes in evaluation mode are not counted. Each process of data-parallel training sees its own share of the batch.

    Args:
        model: a model with one stack of blocks (of several, the first), before torch.compile.
        every: of how many training passes one is recorded.

    Raises:
        ValueError: the model has no stack of blocks.
    """

    def __init__(self, model: nn.Module, every: int = 1):
        stacks = block_lists(model)
        if not stacks:
            raise ValueError(f"{type(model).__name__} has no list of blocks: nothing to probe.")
        self.model = model
        self.every = every
        self.stack, self._blocks = next(iter(stacks.items()))
        self.profiles: list[DepthProfile] = []
        self._open: DepthProfile | None = None
        self._passes = 0
        self._handles: list = []

    def __enter__(self) -> HiddenStateProbe:
        self._handles = [
            self.model.register_forward_pre_hook(self._start),
            self.model.register_forward_hook(self._stop),
            self._blocks[0].register_forward_pre_hook(self._first_input, with_kwargs=True),
            *(block.register_forward_hook(self._output) for block in self._blocks),
        ]
        return self

    def __exit__(self, *exception) -> None:
        for handle in self._handles:
            handle.remove()

    def bound(self, profile: DepthProfile) -> list[float]:
        """Return `peri_ln_bound` of a Peri-LN model, the bound on MA(X_d) by depth, with its norms as they are now.

        Raises:
            ValueError: the model's residual branches were not changed by `to_peri_ln`.
        """
        ends = self._ends()
        if not ends or any(end.norm is None for end in ends):
            raise ValueError("the bound is one of Peri-LN models: call to_peri_ln(model) first.")
        gains, biases = zip(*(norm_gain(end.norm) for end in ends))
        alphas = [1.0 if end.alpha is None else abs(end.alpha.item()) for end in ends]
        step = max(end.step * alpha for end, alpha in zip(ends, alphas))
        return peri_ln_bound(profile.rms[0], len(self._blocks), _largest(gains), _largest(biases), step)

    def plot(self, path: str) -> None:
        """Write a PNG: activation, variance and gradient norm by depth, first, middle and last profile.

        Raises:
            ImportError: names the extra. ValueError: nothing was recorded.
        """
        from .plots import plot_depth

        if not self.profiles:
            raise ValueError("nothing was recorded: no training pass ran within the probe.")
        ends = self._ends()
        peri_ln = bool(ends) and all(end.norm is not None for end in ends)
        plot_depth(path, self.profiles, self.bound(self.profiles[-1]) if peri_ln else None)

    def _ends(self) -> list[ResidualEnd]:
        return [end for path, end in residual_ends(self.model).items() if path.startswith(f"{self.stack}.")]

    def _start(self, model, args) -> None:
        if model.training and torch.is_grad_enabled():
            self._passes += 1
            if self._passes % self.every == 0:
                self._open = DepthProfile(self._passes)
                self._open.gradient_norm = [float("nan")] * (len(self._blocks) + 1)

    def _stop(self, model, args, output) -> None:
        if self._open is not None:
            self.profiles.append(self._open)
            self._open = None

    def _first_input(self, block, args, kwargs) -> None:
        x = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.is_floating_point()), None)
        self._add(x)

    def _output(self, block, args, output) -> None:
        self._add(output[0] if isinstance(output, (tuple, list)) else output)

    def _add(self, x: Tensor) -> None:
        profile = self._open
        if profile is None:  # a pass that is not recorded, or a recomputation for gradient checkpointing
            return
        depth = len(profile.mean_abs)
        for name, figure in hidden_state_figures(x.detach()).items():
            getattr(profile, name).append(figure)
        if x.requires_grad:

            def keep(gradient: Tensor) -> None:
                profile.gradient_norm[depth] = gradient.float().norm().item()

            x.register_hook(keep)


def hidden_state_figures(x: Tensor) -> dict[str, float]:
    """Return MA, variance over the features and root mean square of hidden states (..., features), in float32."""
    x = x.float()
    return {
        "mean_abs": x.abs().mean().item(),
        "variance": x.var(dim=-1, correction=0).mean().item(),
        "rms": x.square().mean().sqrt().item(),
    }


def peri_ln_bound(rms_0: float, depth: int, gain: float, bias: float, step: float = 1.0) -> list[float]:
    """Bound the mean absolute activation of a Peri-LN model by depth D = 0..depth (arXiv 2510.09904).

    MA(X_D) ≤ ‖X_0‖_F/sqrt(nd) + 2 D Δt (γ_max + β_max). Each of a block's two branches adds Δt times a normalised
    vector, whose MA is at most γ_max + β_max.
    """
    return [rms_0 + 2 * d * step * (gain + bias) for d in range(depth + 1)]


def _largest(tensors: Iterable[Tensor]) -> float:
    return max(tensor.max().item() for tensor in tensors)
