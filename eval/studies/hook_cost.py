"""Measure what the hook on optimizers adds to a step in which no rescaling is due.

Steps with the hook and without it alternate, for the optimizer of an adapter and for one of other parameters of the
same number and shapes. The hook's own time is measured in the same run, and stated beside the time of the step.

    python -m eval.studies.hook_cost --layers 224 --repeats 50
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from peft import get_peft_model
from torch import nn

from peft_scalora import ScaLoRAConfig, automatic_rescaling
from peft_scalora.rescaling.hooks import before_step

NEVER = 10**9


def make_model(layers: int, width: int, r: int) -> nn.Module:
    """Return a model of square layers, each with an adapter that is never due."""
    base = nn.ModuleDict({f"layer{i}": nn.Linear(width, width, bias=False) for i in range(layers)})
    return get_peft_model(base, ScaLoRAConfig(r=r, scaling_interval=NEVER, target_modules=list(base)))


def make_optimizers(model: nn.Module) -> dict[str, torch.optim.Optimizer]:
    """Return an AdamW of the adapter, and one of unrelated parameters of the same shapes."""
    own = [p for p in model.parameters() if p.requires_grad]
    other = [nn.Parameter(p.detach().clone()) for p in own]
    for p in own + other:
        p.grad = torch.randn_like(p)
    return {"of the adapter": torch.optim.AdamW(own, lr=1e-4), "of other parameters": torch.optim.AdamW(other, lr=1e-4)}


def milliseconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return (time.perf_counter() - started) * 1e3


def measure(optimizer: torch.optim.Optimizer, repeats: int) -> tuple[float, float]:
    """Return medians of the hook and of the step without it, in milliseconds."""
    hook, step = [], []
    for _ in range(2):  # the state and the plan of steps are made
        optimizer.step()
    for _ in range(repeats):
        hook.append(milliseconds(lambda: before_step(optimizer, (optimizer,), {})))
        with automatic_rescaling(False):
            step.append(milliseconds(optimizer.step))
    return statistics.median(hook), statistics.median(step)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=224)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=50)
    options = parser.parse_args()
    print("| AdamW | hook, ms | step, ms | hook / step |\n|---|---|---|---|")
    model = make_model(options.layers, options.width, options.r)
    for name, optimizer in make_optimizers(model).items():
        hook, step = measure(optimizer, options.repeats)
        print(f"| {name} | {hook:.3f} | {step:.3f} | {hook / step:.1%} |")


if __name__ == "__main__":
    main()
