"""Change the residual branches of models that exist: step size, X + Δt f(X), and Peri-LN, f = LN(g(LN(X))).

A block with residual branches is an Euler step, X ← X + Δt f(X). In a Pre-LN block, f(X) = g(LN(X)), hidden states
can grow exponentially with depth; in a Peri-LN block, f(X) = LN(g(LN(X))), at most linearly (arXiv 2510.09904). Δt < 1
tames the first and improves the second.

The last module of each branch gets a child `residual_end`, which does what follows: normalise, scale. Names of all
other parameters stay, so that adapters and sharding plans written for the model still fit. A model that was changed is
saved under a model type of its own, so that nothing loads it as what it no longer is; `load_residual` loads it.
"""

from __future__ import annotations

import copy
import json
import os
from dataclasses import asdict
from functools import cache

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from .blocks import Branch, find_branches, is_norm, norm_gain

PREFIX = "Residual"


class ResidualEnd(nn.Module):
    """Apply what follows a residual branch: norm, if there is one, then α (ReZero), if there is one, then Δt.

    Args:
        branch: where it is, and which normalisation to make `norm` like.
        step: Δt.
    """

    def __init__(self, branch: Branch, step: float = 1.0):
        super().__init__()
        self.branch = branch
        self.step = step
        self.norm: nn.Module | None = None
        self.alpha: nn.Parameter | None = None

    def forward(self, f_x: Tensor) -> Tensor:
        if self.norm is not None:
            f_x = self.norm(f_x)
        if self.alpha is not None:
            f_x = self.alpha.to(f_x.dtype) * f_x
        return f_x if self.step == 1 else self.step * f_x

    def extra_repr(self) -> str:
        return f"step={self.step:g}"


class ResidualBranch:
    """Send the output of a branch's last module, or the first of its outputs, through the end: a mixin of its class."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        if isinstance(output, tuple):
            return (self.residual_end(output[0]), *output[1:])
        return self.residual_end(output)


class ResidualAdapter(ResidualBranch):
    """Do for an adapter of a branch's last module, which keeps the end, what `ResidualBranch` does: a mixin."""

    @property
    def residual_end(self) -> ResidualEnd:
        layer = self
        while isinstance(layer, BaseTunerLayer):  # get_base_layer gives more than is wanted: a weight to read
            layer = layer.base_layer
        return layer.residual_end


class ResidualParent:
    """Hand the end of a branch on when its last module, a child of this one, is adapted: a mixin of the parent's class.

    PEFT puts an adapter in the child's place, which adds to what the child returns. The end has to follow their sum, so
    the adapter runs it in the child's stead, until it is merged or unloaded.
    """

    def __setattr__(self, name, value):
        old = vars(self).get("_modules", {}).get(name)
        super().__setattr__(name, value)
        if isinstance(old, ResidualBranch) and (isinstance(old, BaseTunerLayer) or isinstance(value, BaseTunerLayer)):
            old.__class__ = type(old).__bases__[1]
            value.__class__ = _branch_class(type(value))


class ResidualModel:
    """Build what `config.residual` says when a changed model is loaded: a mixin of a Hugging Face model's class."""

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        for entry in config.residual:
            branch = Branch(entry["path"], entry["norm"], entry["post_ln"])
            end = _insert(self, branch)
            end.step = entry["step"]
            if entry["peri_ln"]:
                _add_norm(self, end)
            if entry["zero_init"]:
                _add_alpha(self, end)


def scale_residual(model: nn.Module, step: float, zero_init: bool = False, inputs: dict | None = None) -> list[str]:
    """Scale the residual branches of every block: X + Δt f(X) (arXiv 2510.09904); a second call sets another Δt.

    Δt ≠ 1 changes the function of a pretrained model: measure what it costs there before relying on it.

    Args:
        model: GPT-2, Llama, BERT-type, or any model whose blocks fit `find_branches`; before any adapter is added.
        step: Δt, above 0; the paper uses 0.1.
        zero_init: multiply by a trainable α of 0 as well (ReZero): every block starts as the identity.
        inputs: keyword arguments of one forward pass, for a model that is not from Hugging Face.

    Returns:
        The paths of the modules that end the branches.

    Raises:
        ValueError: step is not positive, or a block cannot be placed; names it.
    """
    if not step > 0:
        raise ValueError(f"step={step!r} must be above 0.")
    ends = _ends(model, inputs)
    for end in ends.values():
        end.step = float(step)
        if zero_init and end.alpha is None:
            _add_alpha(model, end)
    _record(model, ends)
    return list(ends)


def to_peri_ln(model: nn.Module, inputs: dict | None = None) -> list[str]:
    """Normalise what each residual branch returns: X + LN(g(LN(X))) (Peri-LN, arXiv 2510.09904).

    Pre-LN blocks get a new normalisation of the same class with gain 1 and bias 0. In BERT-type blocks the one after
    the addition moves before it: norm(X + f(X)) becomes X + norm(f(X)), without a norm of the branch's input (as OLMo-2
    has it). Either changes the function of the model: meant for training from scratch.

    Args, Returns: as for `scale_residual`.

    Raises:
        ValueError: a block is Peri-LN already, cannot be placed, or has a norm of an unknown kind; names it.
    """
    ends = _ends(model, inputs)
    for path, end in ends.items():
        if end.norm is not None or is_norm(model.get_submodule(path)):
            raise ValueError(f"{path} normalises the output of its residual branch: the model is Peri-LN already.")
    for end in ends.values():
        _add_norm(model, end)
    _record(model, ends)
    return list(ends)


def load_residual(folder: str | os.PathLike, model_class: type | None = None, **kwargs) -> PreTrainedModel:
    """Load, as `from_pretrained` does, a model saved after `scale_residual` or `to_peri_ln`.

    Args:
        folder: what `save_pretrained` wrote.
        model_class: the model's class before the change; found in transformers by the name in config.json if not given.
        kwargs: of `from_pretrained`.

    Raises:
        ValueError: the folder holds no such model.
    """
    import transformers

    with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
        saved = json.load(file)
    if "residual" not in saved:
        raise ValueError(f"{os.fspath(folder)!r} holds a model with ordinary residual branches: use from_pretrained.")
    if model_class is None:
        name = saved["architectures"][0].removeprefix(PREFIX)
        model_class = getattr(transformers, name, None)
        if model_class is None:
            raise ValueError(f"transformers has no class {name!r}: give model_class.")
    return residual_class(model_class).from_pretrained(folder, **kwargs)


def residual_ends(model: nn.Module) -> dict[str, ResidualEnd]:
    """Return the ends of the residual branches that were changed, by the path of the branch's last module."""
    ends = (module for module in model.modules() if isinstance(module, ResidualEnd))
    return {end.branch.path: end for end in ends}


@cache
def residual_class(cls: type) -> type:
    """Make the class of a changed model, which loads what it saves, under a model type of its own."""
    config = cls.config_class
    config = type(PREFIX + config.__name__, (config,), {"model_type": f"residual_{config.model_type}"})
    return type(PREFIX + cls.__name__, (ResidualModel, cls), {"config_class": config, "__doc__": cls.__doc__})


@cache
def _branch_class(cls: type) -> type:
    mixin = ResidualAdapter if issubclass(cls, BaseTunerLayer) else ResidualBranch
    return type(PREFIX + cls.__name__, (mixin, cls), {})


@cache
def _parent_class(cls: type) -> type:
    # The name stays: sharding policies know blocks by it.
    return type(cls.__name__, (ResidualParent, cls), {"__doc__": cls.__doc__})


def _ends(model: nn.Module, inputs: dict | None) -> dict[str, ResidualEnd]:
    if hasattr(model, "peft_config"):
        raise ValueError("model has adapters: change its residual branches before adding them.")
    ends = residual_ends(model)
    if not ends:
        ends = {branch.path: _insert(model, branch) for branch in find_branches(model, inputs)}
    return ends


def _insert(model: nn.Module, branch: Branch) -> ResidualEnd:
    module = model.get_submodule(branch.path)
    end = ResidualEnd(branch)
    if isinstance(module, nn.Sequential):  # runs all its children, so the end is one of them
        module.add_module("residual_end", end)
        return end
    module.__class__ = _branch_class(type(module))
    module.residual_end = end
    if [*module.parameters(recurse=False), *module.buffers(recurse=False)]:  # what adapters are for
        parent = model.get_submodule(branch.path.rpartition(".")[0])
        if not isinstance(parent, ResidualParent):
            parent.__class__ = _parent_class(type(parent))
    return end


def _add_norm(model: nn.Module, end: ResidualEnd) -> None:
    parent, _, name = end.branch.norm.rpartition(".")
    norm = model.get_submodule(end.branch.norm)
    if end.branch.post_ln:
        setattr(model.get_submodule(parent), name, nn.Identity())
        end.norm = norm
        return
    end.norm = _neutral(norm, end.branch.norm)


def _neutral(norm: nn.Module, path: str) -> nn.Module:
    """Make a normalisation of the class of `norm` that only normalises: γ = 1, β = 0."""
    norm = copy.deepcopy(norm)
    for weight in (1.0, 0.0):  # Gemma's norms multiply by 1 + weight
        for name, parameter in norm.named_parameters():
            nn.init.constant_(parameter, 0.0 if name == "bias" else weight)
        if any(parameter.is_meta for parameter in norm.parameters()):  # values come with the weights that are loaded
            return norm
        gain, bias = norm_gain(norm)
        if torch.allclose(gain, torch.ones_like(gain), atol=1e-3) and not bias.any():
            return norm
    raise ValueError(
        f"{path} ({type(norm).__name__}) has a gain of 1 neither with weight 1 nor with weight 0: use a LayerNorm or "
        "RMSNorm."
    )


def _add_alpha(model: nn.Module, end: ResidualEnd) -> None:
    reference = model.get_submodule(end.branch.path)
    parameter = next(reference.parameters(), next(model.parameters()))
    end.alpha = nn.Parameter(torch.zeros((), device=parameter.device, dtype=parameter.dtype))


def _record(model: nn.Module, ends: dict[str, ResidualEnd]) -> None:
    """Write what was changed to the configuration, which is what the model is built from when it is loaded."""
    if not isinstance(model, PreTrainedModel):
        return
    _own_config(model)
    if not isinstance(model, ResidualModel):
        model.__class__ = residual_class(type(model))
        model.config.__class__ = model.config_class
    model.config.residual = [
        {**asdict(end.branch), "step": end.step, "peri_ln": end.norm is not None, "zero_init": end.alpha is not None}
        for end in ends.values()
    ]


def _own_config(model: PreTrainedModel) -> None:
    """Give the model and its modules a copy of their configuration, as other models may be built from the original."""
    copies: dict[int, object] = {}  # by the id of the original: a model's modules may hold a part of its configuration
    copy.deepcopy(model.config, copies)
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, PreTrainedConfig) and id(value) in copies:
                setattr(module, name, copies[id(value)])
