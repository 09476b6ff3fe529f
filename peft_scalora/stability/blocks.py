"""Where the residual branches of a model end, found by running it once and adding up what its modules return."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor, nn

MAX_BRANCHES = 4  # of one block


@dataclass(frozen=True)
class Branch:
    """One residual branch: x + f(x), or norm(x + f(x)) in a post-LN block.

    Attributes:
        path: the module whose output is f(x).
        norm: a normalisation of the same width, to make others like it; in a post-LN block the one after the addition.
        post_ln: the block normalises after the addition.
    """

    path: str
    norm: str
    post_ln: bool


@dataclass
class _Call:
    inputs: list[Tensor]
    output: Tensor


def is_norm(module: nn.Module) -> bool:
    """LayerNorm, RMSNorm and whatever else says so in its class name."""
    return "norm" in type(module).__name__.lower()


def block_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Every outermost list of modules that have one class, parameters and children: the stacks of blocks, by path."""
    found: dict[str, nn.ModuleList] = {}
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(path.startswith(f"{outer}.") for outer in found):
            continue
        same = len({type(block) for block in module}) == 1
        if same and all(len(list(block.children())) and len(list(block.parameters())) for block in module):
            found[path] = module
    return found


def find_branches(model: nn.Module, inputs: Mapping[str, Tensor] | None = None) -> list[Branch]:
    """The residual branches of every block, in order.

    A pre-LN (or Peri-LN) block is recognised by what it computes: its output is its input plus the outputs of some of
    its direct children. A BERT-type block holds modules whose last step is norm(x + child).

    Args:
        inputs: keyword arguments of one forward pass; a Hugging Face model brings its own (`dummy_inputs`).

    Raises:
        ValueError: names the model or the block that fits neither.
    """
    stacks = {path: blocks for path, blocks in block_lists(model).items() if any(map(is_norm, blocks.modules()))}
    if not stacks:
        raise ValueError(f"{type(model).__name__} has no list of blocks with normalisations: nothing to place.")
    calls = _record(model, inputs)
    branches = []
    for stack, blocks in stacks.items():
        for index, block in enumerate(blocks):
            path = f"{stack}.{index}"
            branches += _pre_ln(path, block, calls) or _post_ln(path, block, calls) or _refuse(path, block)
    return branches


def _refuse(path: str, block: nn.Module):
    children = ", ".join(f"{name} ({type(child).__name__})" for name, child in block.named_children())
    raise ValueError(
        f"{path} ({type(block).__name__}) is not a block whose output is its input plus the outputs of direct "
        f"children, nor one with modules that end in norm(x + child). Its children: {children}. "
        "Give each residual branch a module of its own."
    )


def _pre_ln(path: str, block: nn.Module, calls: dict[str, _Call]) -> list[Branch]:
    call = calls.get(path)
    if call is None or not call.inputs or call.inputs[0].shape != call.output.shape:
        return []
    x = call.inputs[0]
    outputs = {name: calls[f"{path}.{name}"].output for name, _ in block.named_children() if f"{path}.{name}" in calls}
    # Some blocks flatten batch and sequence for their branch.
    outputs = {name: output.reshape(x.shape) for name, output in outputs.items() if output.numel() == x.numel()}
    for count in range(1, MAX_BRANCHES + 1):
        for names in combinations(outputs, count):
            if _equal(_sum(x, *(outputs[name] for name in names)), call.output):
                norm = next((name for name, child in block.named_children() if is_norm(child)), None)
                return [Branch(f"{path}.{name}", f"{path}.{norm}", False) for name in names] if norm else []
    return []


def _post_ln(path: str, block: nn.Module, calls: dict[str, _Call]) -> list[Branch]:
    branches = []
    for name, module in block.named_modules(prefix=path):
        for norm_name, norm in module.named_children():
            norm_path = f"{name}.{norm_name}"
            if not is_norm(norm) or norm_path not in calls or name not in calls:
                continue
            if not _equal(calls[norm_path].output, calls[name].output):
                continue
            added = calls[norm_path].inputs[0]
            children = [f"{name}.{child}" for child, _ in module.named_children() if child != norm_name]
            # Last first: a dropout that adds nothing in this pass is part of the branch when training.
            ends = [
                child
                for child in reversed(children)
                if child in calls
                and calls[child].output.shape == added.shape
                and any(
                    _equal(_sum(x, calls[child].output), added) for x in calls[name].inputs if x.shape == added.shape
                )
            ]
            branches += [Branch(end, norm_path, True) for end in ends[:1]]
    return branches


def _sum(*terms: Tensor) -> Tensor:
    return torch.stack([term.double() for term in terms]).sum(0)


def _equal(x: Tensor, y: Tensor) -> bool:
    """Equal up to the rounding of y's dtype."""
    if x.shape != y.shape:
        return False
    tolerance = 16 * torch.finfo(y.dtype).eps
    return bool((x.double() - y.double()).norm() <= tolerance * y.double().norm())


def _record(model: nn.Module, inputs: Mapping[str, Tensor] | None) -> dict[str, _Call]:
    """Tensor arguments and output of each module that one forward pass in evaluation mode calls exactly once."""
    if inputs is None:
        inputs = getattr(model, "dummy_inputs", None)
        if inputs is None:
            raise ValueError(f"{type(model).__name__} brings no dummy_inputs: give inputs, the arguments of forward.")
    calls: dict[str, list[_Call]] = {}

    def hook(path: str):
        def record(module, args, kwargs, output):
            output = output[0] if isinstance(output, (tuple, list)) else output
            given = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.is_floating_point()]
            if isinstance(output, Tensor) and output.is_floating_point():
                calls.setdefault(path, []).append(_Call(given, output))

        return record

    training = {module: module.training for module in model.modules()}
    parameter = next(model.parameters())
    handles = [m.register_forward_hook(hook(path), with_kwargs=True) for path, m in model.named_modules()]
    try:
        model.eval()
        with torch.no_grad():
            model(**{name: x.to(parameter.device) for name, x in inputs.items()})
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in training.items():
            module.training = mode
    return {path: records[0] for path, records in calls.items() if len(records) == 1}
