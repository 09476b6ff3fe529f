"""Runs that share no forward pass: each is trained through the model that eval.baselines makes of the base model."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from eval import baselines
from eval.baselines.relora import CYCLES, ReLoRACallback, jagged

from .frontier_runs import METHODS, Run
from .frontier_scores import Scored, cosine


@dataclass(frozen=True)
class Settings:
    """Settings that eval.baselines reads of a method."""

    method: str
    r: int
    steps: int
    seed: int
    target_modules: str = "all-linear"

    @property
    def alpha(self) -> int:
        """Return the alpha of every method here, 2 r."""
        return 2 * self.r

    @property
    def warmup_steps(self) -> int:
        """Return the steps in which ReLoRA's rate rises again, a tenth of a cycle."""
        return self.steps // CYCLES // 10


class Alone(Scored):
    """One run and its model."""

    def __init__(self, base: nn.Module, run: Run):
        torch.manual_seed(run.seed)
        self.runs = (run,)
        settings = Settings(METHODS[run.method].adapter, run.r, run.steps, run.seed)
        prepared = baselines.prepare(copy.deepcopy(base), settings, ())
        self.model = prepared.model
        self.restarts: ReLoRACallback | None = next(iter(prepared.callbacks), None)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]

    def logits(self, ids_SNT: Tensor) -> Tensor:
        """Return (1, N, T, V)."""
        return self.model(input_ids=ids_SNT[0]).logits[None]

    def rate_factor(self, step: int) -> float:
        """Return the factor of the learning rate: a cosine, times ReLoRA's warm-up after every restart."""
        factor = cosine(step, self.runs[0].steps)
        if self.restarts is not None:
            factor *= jagged(step, self.restarts.period, self.restarts.warmup_steps)
        return factor

    def train(self, task) -> dict:
        """Train as a population does: cosine schedule, gradients clipped at 1; return the number of trained numbers."""
        (run,) = self.runs
        optimizer = torch.optim.AdamW(self.parameters, lr=run.learning_rate, weight_decay=0.0, foreach=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.rate_factor)
        generator = torch.Generator().manual_seed(run.seed)
        for step in tqdm(range(run.steps), desc=run.method, mininterval=20):
            ids_NT, labels_NT = task.batch(generator)
            optimizer.zero_grad()
            self.losses(ids_NT[None], labels_NT[None]).sum().backward()
            nn.utils.clip_grad_norm_(self.parameters, 1.0)
            optimizer.step()
            schedule.step()
            done = step + 1
            if self.restarts is not None and done % self.restarts.period == 0 and done < run.steps:
                self.restarts.restart(optimizer)
        return {"parameters": sum(p.numel() for p in self.parameters)}


def train_alone(base: nn.Module, run: Run, task, base_rows_NT: Tensor) -> dict:
    """Train a run and score it: held-out loss, and loss on the base model's own text."""
    alone = Alone(base, run)
    record = alone.train(task)
    return alone.scores(task, base_rows_NT)[0] | record
