"""Gauss-Newton training as a torch optimizer: inner steps on δ, then a line search that commits it."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .batches import Batch, KnownGradients, Weight
from .config import GaussNewtonConfig
from .grouping import layers_of
from .inner import adapt_damping, conjugate_gradient, inner_rate, make_inner_optimizers
from .line_search import best_step_size, step_sizes
from .linearize import Forward, Loss, ggn_product, linearized_loss_and_grad


class GaussNewton(torch.optim.Optimizer):
    """Full Gauss-Newton, GN-prox-linear and layerwise Gauss-Newton (arXiv 2510.09378) for a loop of one's own.

        optimizer = GaussNewton(model.named_parameters(), GaussNewtonConfig(inner_steps=32), lr=1e-2)
        for x, y in batches:  # every batch is a fresh one
            forward = lambda params: torch.func.functional_call(model, params, (x,))
            loss = optimizer.loss(forward, lambda outputs: F.cross_entropy(outputs, y))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    The parameters are the committed weights θ all the time; δ is state of the optimizer. `inner_steps` steps move δ,
    the next `line_search_steps` compare step sizes on their batches and commit θ ← θ + α δ. Between `loss` and `step`
    everything is as with any optimizer: gradients may be accumulated, averaged over ranks, clipped. The state dict
    holds all there is, so a run resumes exactly, within an inner loop too.

    Args:
        params: named parameters, or groups whose "params" are named; float32 or float64. Frozen ones (requires_grad
            False) are left out.
        config: the method's settings.
        lr: learning rate of the inner steps; may be scheduled. Not used by "cg".
        weight_decay: decoupled decay of θ + δ. Not for "cg".
        betas, eps: of AdamW, which steps what Muon does not.
        muon: names of the matrices that Muon steps; all of them unless given. See `matrix_names`.
        layers: names of the parameters linearized together if `layerwise`; unless given, `layers_of` the parameters,
            which then have to be in the model's order.

    Raises:
        ValueError: parameters have no names or half precision or are all frozen, `muon` names something else than a
            matrix, `layers` do not hold every parameter once, or weights are to decay with "cg".
    """

    def __init__(
        self,
        params: Iterable,
        config: GaussNewtonConfig | None = None,
        lr: float = 1e-2,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        muon: Collection[str] | None = None,
        layers: Sequence[Sequence[str]] | None = None,
    ):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps})
        self.config = config or GaussNewtonConfig()
        self._params = _trainable(self.param_groups)
        self._delta = {name: torch.zeros_like(p) for name, p in self._params.items()}
        self.layers = layers_of(self._params) if layers is None else layers
        self._check_precision()
        self._check_layers()
        self._check_decay()
        muon = self._muon_names(muon)
        # Group by group, since learning rates differ; kept by index, since loading replaces the groups.
        self._inner = [self._inner_optimizers(group, muon) for group in self.param_groups]
        self._batches: list[Batch] = []  # of the step in progress
        self._alphas = step_sizes(self.config.line_search_points)
        start = {"position": 0, "outer_steps": 0, "step_size": math.nan, "loss": math.nan}
        start |= {"losses": [0.0] * len(self._alphas), "damping": self.config.damping, "predicted": 0.0}
        start |= {"config": asdict(self.config)}
        self.param_groups[0].setdefault("gauss_newton", start)

    # What a loop may look at.

    @property
    def progress(self) -> dict:
        """position within the outer step, outer_steps done, the last step_size and the loss it gave, damping."""
        return self.param_groups[0]["gauss_newton"]

    @property
    def in_line_search(self) -> bool:
        """Whether the next step compares step sizes; its loss has no gradient."""
        return self.progress["position"] >= self.config.inner_steps

    @property
    def begins_outer_step(self) -> bool:
        """Whether the next step is the first after a commit."""
        return self.progress["position"] == 0

    def start_line_search(self) -> None:
        """End the inner loop early: the next steps choose the step size. For the last steps of a training."""
        self.progress["position"] = max(self.progress["position"], self.config.inner_steps)

    # The loss of one micro-batch.

    def loss(self, forward: Forward, loss: Loss) -> Tensor:
        """The scalar to call `backward` on: the linearized objective, or in a line search the loss at θ (no gradient).

        Args:
            forward: maps a dict of parameters, by the names given to the constructor, to the outputs (one tensor).
            loss: maps the outputs to a scalar that is convex in them.
        """
        batch = Batch(forward, loss, Weight())
        if self.in_line_search:
            batch.losses = self._losses_by_step_size(forward, loss)
            value = batch.losses[self._alphas.index(0.0)]
            # Data-parallel training waits for every gradient.
            gradients = {name: torch.zeros_like(p) for name, p in self._params.items()}
        else:
            value, gradients = self._value_and_gradients(forward, loss)
        if self.in_line_search or self.config.inner_optimizer == "cg":
            self._batches.append(batch)
        return KnownGradients.apply(value, batch.weight, *self._params.values(), *gradients.values())

    def _value_and_gradients(self, forward: Forward, loss: Loss) -> tuple[Tensor, dict[str, Tensor]]:
        if not self.config.layerwise:
            return linearized_loss_and_grad(forward, loss, self._params, self._delta, self.config.variant)
        values, gradients = [], {}
        for index, layer in enumerate(self.layers):
            last = index == len(self.layers) - 1
            # Every layer sees the same dropout masks.
            with nullcontext() if last else self.unchanged_randomness():
                delta = {name: self._delta[name] for name in layer}
                value, part = linearized_loss_and_grad(forward, loss, self._params, delta, self.config.variant)
            values.append(value)
            gradients |= part
        return torch.stack(values).mean(), {name: gradients[name] for name in self._params}

    @torch.no_grad()
    def _losses_by_step_size(self, forward: Forward, loss: Loss) -> Tensor:
        losses = []
        for alpha in self._alphas:
            params = self._params
            if alpha:  # 0 · δ is not 0 where δ overflowed
                params = {name: p.add(self._delta[name], alpha=alpha) for name, p in self._params.items()}
            with self.unchanged_randomness():
                losses.append(loss(forward(params)))
        return torch.stack(losses)

    def unchanged_randomness(self):
        """Random numbers drawn inside are drawn again afterwards."""
        device = next(iter(self._params.values())).device
        return torch.random.fork_rng([device] if device.type == "cuda" else [])

    # The step.

    @torch.no_grad()
    def step(self, closure=None):
        """One inner step, or one step of the line search; the last of those commits.

        Raises:
            RuntimeError: `loss` was not called before. ValueError: a closure was given.
        """
        if closure is not None:
            raise ValueError("GaussNewton takes no closure: call loss(forward, loss), then backward, then step().")
        if self.in_line_search:
            self._line_search_step()
        else:
            self._inner_step()

    def _inner_step(self) -> None:
        if any(p.grad is None for p in self._params.values()):
            raise RuntimeError("GaussNewton.step needs gradients: call optimizer.loss(...).backward() before it.")
        gradients = {
            name: p.grad.add(self._delta[name], alpha=self.config.anchor_l2) for name, p in self._params.items()
        }
        if self.config.inner_optimizer == "cg":
            self._solve(gradients)
        else:
            self._step_inner_optimizers(gradients)
        self._share_state()
        self.progress["position"] += 1

    def _step_inner_optimizers(self, gradients: dict[str, Tensor]) -> None:
        factor = inner_rate(self.config.inner_schedule, self.progress["position"], self.config.inner_steps)
        for group, optimizers in zip(self.param_groups, self._inner):
            rate = group["lr"] * factor
            for name in group["param_names"]:
                delta = self._delta[name]
                if group["weight_decay"]:
                    delta.sub_(self._params[name] + delta, alpha=rate * group["weight_decay"])
                delta.grad = gradients[name]
            for optimizer in optimizers:
                for inner_group in optimizer.param_groups:
                    inner_group["lr"] = rate
                optimizer.step()
                optimizer.zero_grad()

    def _solve(self, gradients: dict[str, Tensor]) -> None:
        """Move δ by conjugate gradients on the model of this step's batches."""

        def product(vector: dict[str, Tensor]) -> dict[str, Tensor]:
            total = {name: torch.zeros_like(v) for name, v in vector.items()}
            for batch in self._batches:
                with self.unchanged_randomness():
                    part = ggn_product(batch.forward, batch.loss, self._params, vector)
                for name in total:
                    total[name].add_(batch.weight.value * part[name])
            return {
                name: _mean_over_ranks(t).add(vector[name], alpha=self.config.anchor_l2) for name, t in total.items()
            }

        progress = self.progress
        update, decrease = conjugate_gradient(product, gradients, progress["damping"], self.config.cg_iterations)
        for name, delta in self._delta.items():
            delta.add_(update[name])
        progress["predicted"] += decrease
        self._batches.clear()

    def _line_search_step(self) -> None:
        """Add up the losses; after the last batch, commit."""
        if not self._batches:
            raise RuntimeError("GaussNewton.step needs losses: call optimizer.loss(...).backward() before it.")
        progress = self.progress
        losses = _mean_over_ranks(sum(batch.weight.value * batch.losses for batch in self._batches)).tolist()
        progress["losses"] = [total + loss for total, loss in zip(progress["losses"], losses)]
        progress["position"] += 1
        self._batches.clear()
        if progress["position"] >= self.config.inner_steps + self.config.line_search_steps:
            self._commit(best_step_size(self._alphas, progress["losses"]))

    def _commit(self, alpha: float) -> None:
        """θ ← θ + α δ. The inner iterate θ + δ stays where it is, unless the step was rejected or solved for.

        Where δ or the inner optimizers' state is not finite, the step is rejected and both start anew.
        """
        progress, losses = self.progress, self.progress["losses"]
        state = [tensor for state in self.state.values() for tensor in state.values()]  # δ and the inner optimizers'
        if not all(tensor.isfinite().all() for tensor in state):
            alpha = 0.0
            for tensor in state:
                tensor.zero_()
        for name, delta in self._delta.items():
            if alpha:
                self._params[name].add_(delta, alpha=alpha)
            if alpha and self.config.inner_optimizer != "cg":
                delta.mul_(1 - alpha)
            else:
                delta.zero_()
        if self.config.inner_optimizer == "cg":
            actual = (losses[-1] - losses[0]) / self.config.line_search_steps
            progress["damping"] = adapt_damping(progress["damping"], actual, progress["predicted"])
        progress |= {"position": 0, "outer_steps": progress["outer_steps"] + 1, "step_size": alpha, "predicted": 0.0}
        progress |= {"loss": losses[self._alphas.index(alpha)] / self.config.line_search_steps}
        progress |= {"losses": [0.0] * len(losses)}

    # State.

    def _share_state(self) -> None:
        """Show δ and the inner optimizers' state, the very tensors, as this optimizer's state of the parameters."""
        inner = {delta: state for optimizer in self._optimizers() for delta, state in optimizer.state.items()}
        for name, p in self._params.items():
            delta = self._delta[name]
            # Trainer loads a checkpoint into an AdamW first, which looks for a step.
            self.state[p] = {"step": torch.zeros(()), **inner.get(delta, {}), "delta": delta}

    def load_state_dict(self, state_dict: dict) -> None:
        """Continue where the saved optimizer was, within an inner loop too.

        Raises:
            ValueError: the state is another optimizer's, or was saved with another config.
        """
        saved = state_dict["param_groups"][0].get("gauss_newton")
        if saved is None:
            raise ValueError("the saved optimizer is not a GaussNewton: start from the saved model, without its state.")
        changed = [name for name, value in asdict(self.config).items() if saved["config"].get(name) != value]
        if changed:
            raise ValueError(
                f"the saved optimizer had another GaussNewtonConfig ({', '.join(changed)}): resume with the same one, "
                "or start from the saved model, without the optimizer's state."
            )
        super().load_state_dict(state_dict)
        for name, p in self._params.items():
            if p in self.state:
                self._delta[name].copy_(self.state[p]["delta"])
        states = {self._delta[name]: self.state[p] for name, p in self._params.items() if p in self.state}
        for optimizer in self._optimizers():
            for delta in (d for group in optimizer.param_groups for d in group["params"] if d in states):
                optimizer.state[delta] = {key: value for key, value in states[delta].items() if key != "delta"}
        if states:
            self._share_state()

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        return [optimizer for optimizers in self._inner for optimizer in optimizers]

    # Checks.

    def _inner_optimizers(self, group: dict, muon: set[str]) -> list[torch.optim.Optimizer]:
        if self.config.inner_optimizer == "cg":
            return []
        delta = {name: self._delta[name] for name in group["param_names"]}
        return make_inner_optimizers(delta, muon, group["betas"], group["eps"])

    def _check_precision(self) -> None:
        for name, p in self._params.items():
            if p.dtype not in (torch.float32, torch.float64):
                raise ValueError(
                    f"parameter {name!r} is {p.dtype}: Gauss-Newton trains in float32. Load the model with "
                    "dtype=torch.float32, or keep half precision for frozen weights only."
                )

    def _check_layers(self) -> None:
        if sorted(name for layer in self.layers for name in layer) != sorted(self._params):
            raise ValueError(f"layers={self.layers!r}: have to hold every parameter once. See layers_of.")

    def _check_decay(self) -> None:
        decays = [group["weight_decay"] for group in self.param_groups if group["weight_decay"]]
        if decays and self.config.inner_optimizer == "cg":
            raise ValueError(
                f"weight_decay={decays[0]!r}: inner_optimizer='cg' solves for the loss alone; pass weight_decay=0."
            )

    def _muon_names(self, muon: Collection[str] | None) -> set[str]:
        if self.config.inner_optimizer != "muon":
            return set()
        if muon is None:
            return {name for name, p in self._params.items() if p.ndim == 2}
        wrong = [name for name in muon if name not in self._params or self._params[name].ndim != 2]
        if wrong:
            raise ValueError(f"muon={wrong!r}: not matrices among the parameters. Muon steps matrices only.")
        return set(muon)


def _trainable(groups: list[dict]) -> dict[str, nn.Parameter]:
    """The parameters by name; the frozen ones leave their groups."""
    if any("param_names" not in group for group in groups):
        raise ValueError("GaussNewton needs named parameters: pass model.named_parameters(), or groups of such pairs.")
    trainable = {}
    for group in groups:
        named = {name: p for name, p in zip(group["param_names"], group["params"]) if p.requires_grad}
        group["param_names"], group["params"] = list(named), list(named.values())
        trainable |= named
    if not trainable:
        raise ValueError("no parameter requires a gradient: unfreeze what GaussNewton is to train.")
    return trainable


def _mean_over_ranks(tensor: Tensor) -> Tensor:
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()
    return tensor
