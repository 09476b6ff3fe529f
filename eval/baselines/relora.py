"""ReLoRA (arXiv 2307.05695): LoRA that is merged into the base and begun anew several times in a run.

At a restart s B A is added to the base weight, A is drawn anew and B set to 0, 99% of the entries of the optimizer
moments of A and B become 0 (those whose first moment is smallest in magnitude), and the learning rate warms up from 0
again. They are the same entries in both moments: a first moment without its second is divided by almost nothing.
Shapes: base weight (m x n) = (out, in), lora_B (m x r), lora_A (r x n).
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback

from peft_scalora.files.atomic import replacing
from peft_scalora.maths.accumulator import effective_rank, singular_values
from peft_scalora.rank import change_factors

from .shared import Prepared, refuse_quantized, shared_fields

CYCLES = 4
PRUNED = 0.99  # part of a moment that a restart sets to zero
MERGED_NAME = "relora_merged.safetensors"


def jagged(step: int, period: int, warmup_steps: int) -> float:
    """Return the factor of the learning rate: constant, after a linear warm-up at the start of every cycle."""
    return min(1.0, step % period / max(1, warmup_steps)) if warmup_steps else 1.0


def prune(moments: Sequence[Tensor], part: float = PRUNED) -> None:
    """Set this part of the entries to zero in all moments: where the first of them is smallest in magnitude."""
    magnitude = moments[0].abs().float()
    threshold = magnitude.flatten().kthvalue(max(1, int(part * magnitude.numel())))[0]
    for moment in moments:
        moment.mul_(magnitude > threshold)


def merge(layer: LoraLayer, P: Tensor, Q: Tensor) -> None:
    """Add P (m x r) Q (r x n) to the base weight: summed in float32, rounded once to the weight's type."""
    weight = layer.get_base_layer().weight
    weight.copy_(weight.float() + P @ Q)


class ReLoRACallback(TrainerCallback):
    """Restarts the LoRA adapter of a model every `period` steps, but not at the end.

    The factors of all merged changes are kept in one small file beside Trainer's checkpoints: a run that is continued
    merges them again, in the same order, into the base it has loaded.
    """

    def __init__(self, model: nn.Module, period: int, warmup_steps: int, seed: int = 0):
        self.period, self.warmup_steps, self.seed = period, warmup_steps, seed
        self.layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
        self.merged: list[dict[str, tuple[Tensor, Tensor]]] = []  # of each restart: layer name -> P, Q

    def on_train_begin(self, args, state, control, lr_scheduler=None, **kwargs):
        lr_scheduler.lr_lambdas = [self._factor] * len(lr_scheduler.lr_lambdas)
        restarts = min(state.global_step, state.max_steps - 1) // self.period
        if restarts:
            self._merge_again(os.path.join(args.output_dir, MERGED_NAME), restarts)

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        if state.global_step % self.period == 0 and state.global_step < state.max_steps:
            self.restart(optimizer)
            if state.is_world_process_zero:
                self._save(os.path.join(args.output_dir, MERGED_NAME))

    def _factor(self, step: int) -> float:
        return jagged(step, self.period, self.warmup_steps)

    @torch.no_grad()
    def restart(self, optimizer: torch.optim.Optimizer) -> None:
        """Merge, draw A anew, and prune the moments of both factors."""
        self.merged.append({})
        with torch.random.fork_rng():
            torch.manual_seed(self.seed + len(self.merged))  # the same A on all ranks, and not the one it began with
            for name, layer in self.layers.items():
                factors = tuple(factor.clone() for factor in change_factors(layer, "default"))
                self.merged[-1][name] = factors
                merge(layer, *factors)
                layer.reset_lora_parameters("default", True)
        for layer in self.layers.values():
            for factor in (layer.lora_A["default"].weight, layer.lora_B["default"].weight):
                state = optimizer.state.get(factor, {})
                moments = [state[name] for name in ("exp_avg", "exp_avg_sq") if name in state]
                if moments:
                    prune(moments)

    def effective_rank(self, model: nn.Module, tol: float = 0.01) -> dict[str, int]:
        """Return the rank of all merged changes and the present one together, per layer."""
        ranks = {}
        for name, layer in self.layers.items():
            P, Q = zip(*(merged[name] for merged in self.merged), change_factors(layer, "default"))
            ranks[name] = int(effective_rank(singular_values(torch.cat(P, 1), torch.cat(Q)), tol))
        return ranks

    def _save(self, path: str) -> None:
        tensors = {
            f"{restart}.{factor}.{name}": tensor.cpu()
            for restart, merged in enumerate(self.merged)
            for name, factors in merged.items()
            for factor, tensor in zip("PQ", factors)
        }
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with replacing(path) as temporary:
            save_file(tensors, temporary)

    @torch.no_grad()
    def _merge_again(self, path: str, restarts: int) -> None:
        if not os.path.exists(path):
            raise FileNotFoundError(
                f"{path} is missing: the checkpoint cannot be continued without the changes that are merged into the "
                "base by now. Delete the folder to train from the start."
            )
        tensors = load_file(path)
        for restart in range(restarts):
            merged = {}
            for name, layer in self.layers.items():
                device = layer.get_base_layer().weight.device
                merged[name] = tuple(tensors[f"{restart}.{factor}.{name}"].to(device) for factor in "PQ")
                merge(layer, *merged[name])
            self.merged.append(merged)


def relora(model, settings, batches) -> Prepared:
    """Prepare LoRA with three restarts, at equal distances; each warms up as long as the start does.

    Raises:
        ValueError: the base is quantized, or a cycle has no step at the whole learning rate.
    """
    refuse_quantized(model, settings, "every restart changes its weights")
    period = -(-settings.steps // CYCLES)
    if settings.warmup_steps >= period:
        raise ValueError(
            f"warmup_steps={settings.warmup_steps} must be below {period}, the steps between two restarts of "
            f"method='relora' (steps={settings.steps} / {CYCLES})."
        )
    model = get_peft_model(model, LoraConfig(**shared_fields(model, settings)))
    callback = ReLoRACallback(model, period, settings.warmup_steps, settings.seed)
    return Prepared(model, [callback], effective_rank=callback.effective_rank)
