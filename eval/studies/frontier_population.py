"""Several adapters of one rank, trained at once on one frozen base model.

Every run has a model of its own with a real adapter, which a real optimizer steps and rescales. Only the forward and
backward passes are shared: one copy of the base model evaluates all runs as one batch, in which every run's rows meet
its own factors. A small model spends most of a step on the calls of its operations, which are then paid once.

Suffixes: S runs, N rows of a run, T bytes of a row, r rank; `left` is lora_B and `right` lora_A.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Sequence

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from tqdm import tqdm

from peft_scalora import ScaLoRAConfig, last_report
from peft_scalora.layer import ScaLoRALayer

from .frontier_runs import METHODS, Method, Run
from .frontier_scores import Scored, cosine

ADAPTER = "default"
# Rescalings whose scales are recorded, evenly over the steps.
RECORDED = 20


def adapted(base: nn.Module, method: Method, r: int) -> nn.Module:
    """Return a copy of the base model with the method's adapter on its linear layers, the output head left out.

    The accumulator of a ScaLoRA adapter is lossless, as if what is folded went into the base weight, unless the method
    names a rank.
    """
    base = copy.deepcopy(base)
    if method.adapter == "full":
        return base
    settings = {"r": r, "lora_alpha": 2 * r, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    if method.adapter == "lora":
        return get_peft_model(base, LoraConfig(**settings | method.options))
    settings |= {"accumulator": "factored", "accumulator_rank": base.config.hidden_size}
    return get_peft_model(base, ScaLoRAConfig(scaling_interval=method.interval, **settings | method.options))


def inner_model(model: nn.Module) -> nn.Module:
    """Return the transformers model inside PEFT's, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


class PopulationLinear(nn.Module):
    """One linear layer of S runs: W x + s left right x, each run with its own W, left and right."""

    def __init__(self, layers: Sequence[nn.Module]):
        super().__init__()
        self.layers = tuple(layers)  # a tuple, so that these are not submodules
        bases = [getattr(layer, "base_layer", layer) for layer in layers]
        self.bias = bases[0].bias
        self.pristine_SMN = torch.stack([base.weight.detach() for base in bases])
        self.is_adapted = hasattr(layers[0], "lora_A")
        if self.is_adapted:
            self.weight_SMN = self.pristine_SMN.clone()
            self.scale = layers[0].scaling[ADAPTER]
            self.left_SMr = self._shared([layer.lora_B[ADAPTER].weight for layer in layers])
            self.right_SrN = self._shared([layer.lora_A[ADAPTER].weight for layer in layers])
        else:
            self.weight_SMN = self._shared([base.weight for base in bases])

    @staticmethod
    def _shared(parameters: Sequence[nn.Parameter]) -> Tensor:
        """Return one tensor of which every run's parameter, and its gradient, is a part."""
        stacked = torch.stack([p.detach() for p in parameters]).requires_grad_()
        stacked.grad = torch.zeros_like(stacked)
        for parameter, part, grad in zip(parameters, stacked.detach(), stacked.grad):
            parameter.data = part
            parameter.grad = grad
        return stacked

    def forward(self, x: Tensor) -> Tensor:
        """Map (S N, T, in) to (S N, T, out)."""
        x_SKN = x.reshape(len(self.weight_SMN), -1, x.shape[-1])
        y_SKM = torch.bmm(x_SKN, self.weight_SMN.mT) + self.bias
        if self.is_adapted:
            y_SKM = torch.baddbmm(y_SKM, torch.bmm(x_SKN, self.right_SrN.mT), self.left_SMr.mT, alpha=self.scale)
        return y_SKM.view(*x.shape[:-1], -1)

    def take_folds(self) -> None:
        """Add to every run's weight what its rescalings have folded."""
        for weight, pristine, layer in zip(self.weight_SMN, self.pristine_SMN, self.layers):
            if isinstance(layer, ScaLoRALayer):
                torch.add(pristine, layer.accumulator(ADAPTER).weight(), out=weight)

    @torch.no_grad()
    def column_norms(self) -> tuple[Tensor, Tensor]:
        """Return the norms of the columns of left and of the rows of right, both (S, r)."""
        return self.left_SMr.norm(dim=1), self.right_SrN.norm(dim=2)


class Population(Scored):
    """Runs of one rank and length whose methods are of one kind."""

    def __init__(self, base: nn.Module, runs: Sequence[Run]):
        self.runs = tuple(runs)
        self.methods = [METHODS[run.method] for run in runs]
        self.copies = [self._own_model(base, run) for run in self.runs]
        self.model = copy.deepcopy(base).requires_grad_(False)
        self.linears = []
        for name, module in list(self.model.named_modules()):
            if isinstance(module, nn.Linear) and module is not self.model.get_output_embeddings():
                layers = [inner_model(each).get_submodule(name) for each in self.copies]
                self.linears.append(PopulationLinear(layers))
                self.model.set_submodule(name, self.linears[-1])
        self.parameters = [self._trained(index) for index in range(len(runs))]

    @staticmethod
    def _own_model(base: nn.Module, run: Run) -> nn.Module:
        torch.manual_seed(run.seed)
        return adapted(base, METHODS[run.method], run.r)

    def _trained(self, index: int) -> list[nn.Parameter]:
        layers = [linear.layers[index] for linear in self.linears]
        if not self.linears[0].is_adapted:
            return [layer.weight for layer in layers]
        return [part[ADAPTER].weight for layer in layers for part in (layer.lora_B, layer.lora_A)]

    def logits(self, ids_SNT: Tensor) -> Tensor:
        """Return (S, N, T, V); the rows of a run may be those of all."""
        ids_SNT = ids_SNT.expand(len(self.runs), -1, -1)
        return self.model(input_ids=ids_SNT.flatten(0, 1)).logits.unflatten(0, ids_SNT.shape[:2])

    def make_optimizer(self) -> torch.optim.Optimizer:
        """Return AdamW, or Muon with updates as large as AdamW's, with one group of parameters a run."""
        groups = [{"params": own, "lr": run.learning_rate} for own, run in zip(self.parameters, self.runs)]
        if self.methods[0].optimizer == "muon":
            return torch.optim.Muon(groups, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
        return torch.optim.AdamW(groups, weight_decay=0.0, foreach=True)

    def train(self, task) -> list[dict]:
        """Train all runs: cosine schedule, gradients clipped at 1 run by run; return what the factors came to."""
        steps = self.runs[0].steps
        optimizer = self.make_optimizer()
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: cosine(n, steps))
        generators = [torch.Generator().manual_seed(run.seed) for run in self.runs]
        watch = ScaleWatch(self, optimizer)
        interval = self.methods[0].interval
        seen = None
        for step in tqdm(range(steps), desc=f"{len(self.runs)} runs", mininterval=20):
            self._set_intervals(step)
            ids, labels = (torch.stack(part) for part in zip(*map(task.batch, generators)))
            self._zero_gradients()
            self.losses(ids, labels).sum().backward()
            for own in self.parameters:
                nn.utils.clip_grad_norm_(own, 1.0)
            watch.is_open = step % max(interval, steps // RECORDED) < interval
            watch.before()
            optimizer.step()
            schedule.step()
            if last_report(optimizer) is not seen:
                seen = last_report(optimizer)
                for linear in self.linears:
                    linear.take_folds()
        return watch.results()

    def _zero_gradients(self) -> None:
        """Set the gradients to zero in place: those of the runs are parts of them."""
        for linear in self.linears:
            stacked = (linear.left_SMr, linear.right_SrN) if linear.is_adapted else (linear.weight_SMN,)
            for tensor in stacked:
                tensor.grad.zero_()

    def _set_intervals(self, step: int) -> None:
        """Have a method with a start rescaled from there on."""
        for model, method, run in zip(self.copies, self.methods, self.runs):
            if method.start:
                model.peft_config[ADAPTER].scaling_interval = method.interval if step >= method.start else run.steps + 1


class ScaleWatch:
    """Mean log α, mean log β and the share of unchanged columns of some rescalings, run by run."""

    def __init__(self, population: Population, optimizer: torch.optim.Optimizer):
        self.population = population
        self.linears = population.linears if population.linears[0].is_adapted else []
        self.is_open = False
        self.rows = []
        optimizer.register_step_pre_hook(self._after_rescaling)  # runs after the package's, before the step

    def _norms(self) -> list[Tensor]:
        norms = [linear.column_norms() for linear in self.linears]
        return [torch.stack(part) for part in zip(*norms)]

    def before(self) -> None:
        """Remember the norms before a step that may begin with a rescaling."""
        if self.is_open:
            self.old = self._norms()

    def _after_rescaling(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        if not self.is_open or not self.linears:
            return
        logs = [torch.where(old > 0, new / old, 1).log() for new, old in zip(self._norms(), self.old)]
        if any(log.abs().max() > 1e-6 for log in logs):
            unchanged = torch.stack([(log.abs() < 1e-6).float().mean((0, 2)) for log in logs]).mean(0)
            self.rows.append(torch.stack([*(log.mean((0, 2)) for log in logs), unchanged]))

    def results(self) -> list[dict]:
        """Return the record of every run, with the mean squared column norms at the end."""
        results = [{"parameters": sum(p.numel() for p in own)} for own in self.population.parameters]
        if self.linears:
            left, right = (norms.square().mean((0, 2)) for norms in self._norms())
            for result, norm2_left, norm2_right in zip(results, left.tolist(), right.tolist()):
                result.update(norm2_left=norm2_left, norm2_right=norm2_right)
        if self.rows:
            for index, result in enumerate(results):
                if self.population.methods[index].adapter == "scalora":
                    alpha, beta, unchanged = torch.stack(self.rows).mean(0)[:, index].tolist()
                    result.update(log_alpha=alpha, log_beta=beta, unchanged=unchanged)
        return results


def train_runs(base: nn.Module, runs: Sequence[Run], task, base_rows_NT: Tensor) -> list[dict]:
    """Train runs and score them: held-out loss, loss on the base model's own text, and the record of the factors."""
    population = Population(base, runs)
    records = population.train(task)
    results = [{**score, **record} for score, record in zip(population.scores(task, base_rows_NT), records)]
    del population
    gc.collect()  # the package's hook looks at every adapter there is
    return results
