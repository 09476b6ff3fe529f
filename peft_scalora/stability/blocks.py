"""Find where the residual branches of a model end, by running it once and adding up what its modules return."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain, combinations

import torch
from torch import Tensor, nn

MAX_BRANCHES = 4  # of one block


@dataclass(frozen=True)
class Branch:
    """Describe one residual branch: x + f(x), or norm(x + f(x)) in a post-LN block.

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
    """Hold a call of a module: its floating-point arguments, what it returned, and what its caller got instead."""

    inputs: list[Tensor]
    output: Tensor
    replaced: Tensor


def is_norm(module: nn.Module) -> bool:
    """Return True for LayerNorm, RMSNorm and every other module with "norm" in its class name."""
    return "norm" in type(module).__name__.lower()


def norm_gain(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Measure |γ| and |β| of each feature, as some classes multiply by their weight and others by 1 + weight.

    Returns:
        Two float32 tensors (features,), on the device of the norm.
    """
    norm = copy.deepcopy(norm).float()
    weight = next(norm.parameters())
    n = weight.numel() // 2
    p = weight.numel() - n
    # p positive and n negative features with mean 0 and mean square 1, which normalising leaves as they are.
    x = torch.tensor([(n / p) ** 0.5] * p + [-((p / n) ** 0.5)] * n, dtype=torch.float32, device=weight.device)
    with torch.no_grad():
        plus, minus = (norm(size * x[None])[0] for size in (1000, -1000))  # large, so that eps does not count
    return ((plus - minus) / (2 * x)).abs(), ((plus + minus) / 2).abs()


def block_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Return the stacks of blocks by path: outermost lists of modules with one class, parameters and children."""
    found: dict[str, nn.ModuleList] = {}
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(path.startswith(f"{outer}.") for outer in found):
            continue
        same = len({type(block) for block in module}) == 1
        if same and all(len(list(block.children())) and len(list(block.parameters())) for block in module):
            found[path] = module
    return found


def find_branches(model: nn.Module, inputs: Mapping[str, Tensor] | None = None) -> list[Branch]:
    """Find the residual branches of every block, in order.

    A pre-LN (or Peri-LN) block is recognised by what it computes: its output is its input plus the outputs of some of
    its direct children. A BERT-type block holds modules whose last step is norm(x + child). To see that whatever the
    weights and the dtype, small random integers take the place of what modules are given and return: their sums are
    exact in every dtype, and no branch is hidden because it is small or 0.

    Args:
        inputs: keyword arguments of one forward pass; a Hugging Face model brings its own (`dummy_inputs`).

    Raises:
        ValueError: names the model or the block that fits neither.
    """
    stacks = {path: blocks for path, blocks in block_lists(model).items() if any(map(is_norm, blocks.modules()))}
    if not stacks:
        raise ValueError(f"{type(model).__name__} has no list of blocks with normalisations: nothing to place.")
    inputs = _inputs_of(model) if inputs is None else inputs
    paths = []
    for stack, blocks in stacks.items():
        paths += [f"{stack}.{index}" for index in range(len(blocks))]
    calls = _record(model, paths, inputs)
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
    children = {
        name: calls[f"{path}.{name}"].replaced for name, _ in block.named_children() if f"{path}.{name}" in calls
    }
    # Some blocks flatten batch and sequence for their branch.
    children = {name: output.reshape(x.shape) for name, output in children.items() if output.numel() == x.numel()}
    groups = chain.from_iterable(combinations(children, count) for count in range(1, MAX_BRANCHES + 1))
    fitting = [names for names in groups if _equal(sum((children[name] for name in names), x), call.output)]
    norm = next((name for name, child in block.named_children() if is_norm(child)), None)
    if norm is None or len(fitting) != 1:
        return []
    return [Branch(f"{path}.{name}", f"{path}.{norm}", False) for name in fitting[0]]


def _is_sum(total: Tensor, output: Tensor, inputs: Iterable[Tensor]) -> bool:
    """Tell whether the total is the output plus one of the inputs."""
    return any(x.shape == output.shape and _equal(x + output, total) for x in inputs)


def _post_ln(path: str, block: nn.Module, calls: dict[str, _Call]) -> list[Branch]:
    branches = []
    for name, module in block.named_modules(prefix=path):
        for norm_name, norm in module.named_children():
            norm_path = f"{name}.{norm_name}"
            if not is_norm(norm) or norm_path not in calls or name not in calls:
                continue
            if not _equal(calls[norm_path].replaced, calls[name].output):
                continue
            added = calls[norm_path].inputs[0]
            children = [f"{name}.{child}" for child, _ in module.named_children() if child != norm_name]
            recorded = [child for child in children if child in calls]
            ends = [child for child in recorded if _is_sum(added, calls[child].replaced, calls[name].inputs)]
            branches += [Branch(end, norm_path, True) for end in ends if len(ends) == 1]
    return branches


def _equal(x: Tensor, y: Tensor) -> bool:
    return x.shape == y.shape and torch.equal(x.double(), y.double())


def _inputs_of(model: nn.Module) -> Mapping[str, Tensor]:
    """Return the inputs that a model brings, if it can run on them: many that take no text bring token ids anyway."""
    name = type(model).__name__
    inputs = getattr(model, "dummy_inputs", None)
    if inputs is None:
        raise ValueError(f"{name} brings no dummy_inputs: give inputs, the arguments of forward.")
    try:
        _run(model, inputs, [])
    except Exception as error:
        raise ValueError(
            f"{name} cannot run on its dummy_inputs ({', '.join(inputs)}): give inputs, the arguments of forward."
        ) from error
    return inputs


def _record(model: nn.Module, blocks: list[str], inputs: Mapping[str, Tensor]) -> dict[str, _Call]:
    """Record the calls of blocks, and of modules in them that a forward pass in evaluation mode calls exactly once.

    Integers take the place of the arguments of blocks and of modules with a normalisation, and of what all modules
    within the blocks return.
    """
    modules = {}
    for block in blocks:
        modules.update(model.get_submodule(block).named_modules(prefix=block))
    times = dict.fromkeys(modules, 0)

    def counting(path: str):
        def count(module, args, output):
            times[path] += 1

        return count

    _run(model, inputs, [module.register_forward_hook(counting(path)) for path, module in modules.items()])
    calls: dict[str, _Call] = {}
    generator = torch.Generator().manual_seed(0)

    def integers(x):
        if not _is_float(x):
            return x
        return torch.randint(-8, 9, x.shape, generator=generator).to(x)

    def give(module, args, kwargs):
        return tuple(map(integers, args)), {name: integers(x) for name, x in kwargs.items()}

    def recording(path: str):
        def record(module, args, kwargs, output):
            first = output[0] if isinstance(output, (tuple, list)) else output
            if not _is_float(first):
                return None
            replaced = first if path in blocks else integers(first)
            given = [x for x in (*args, *kwargs.values()) if _is_float(x)]
            calls[path] = _Call(given, first, replaced)
            return type(output)((replaced, *output[1:])) if isinstance(output, (tuple, list)) else replaced

        return record

    handles = []
    for path, module in modules.items():
        if times[path] != 1:
            continue
        if path in blocks or any(map(is_norm, module.children())):
            handles.append(module.register_forward_pre_hook(give, with_kwargs=True))
        handles.append(module.register_forward_hook(recording(path), with_kwargs=True))
    _run(model, inputs, handles)
    return calls


def _is_float(x) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _run(model: nn.Module, inputs: Mapping[str, Tensor], handles: list) -> None:
    """Run one forward pass in evaluation mode, then remove the hooks and restore the mode of every module."""
    training = {module: module.training for module in model.modules()}
    device = next(model.parameters()).device
    try:
        model.eval()
        with torch.no_grad():
            model(**{name: x.to(device) for name, x in inputs.items()})
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in training.items():
            module.training = mode
