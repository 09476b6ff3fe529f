"""Gauss-Newton training as a torch optimizer: inner steps on δ, then a line search that commits it."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict

import torch
from torch import Tensor

from .batches import Batch, KnownGradients, Weight, mean_over_ranks
from .checks import check_decay, check_layers, check_precision, muon_names, take_trainable
from .config import GaussNewtonConfig
from .grouping import layers_of
from .inner import adapt_damping, conjugate_gradient, inner_rate, make_inner_optimizers
from .line_search import best_step_size, step_sizes
from .linearize import Forward, Loss, ggn_product, linearized_loss_and_grad


class GaussNewton(torch.optim.Optimizer):
    """Optimizer for full Gauss-Newton, GN-prox-linear and layerwise Gauss-Newton (arXiv 2510.09378) in a loop.

        optimizer = GaussNewton(model.named_parameters(), GaussNewtonConfig(inner_steps=32), lr=1e-2)
        for x, y in batches:  # every batch is a fresh one
            forward = lambda params: torch.func.functional_call(model, params, (x,))
            loss = optimizer.loss(forward, lambda outputs: F.cross_entropy(outputs, y))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    The parameters always are the committed weights θ; δ is state of the optimizer. The first `inner_steps` steps move
    δ. The next `line_search_steps` compare step sizes on their batches, and the last of them commits θ ← θ + α δ.
    Between `loss` and `step` gradients may be accumulated, averaged over ranks or clipped, as with any optimizer. The
    state dict holds everything, so a run resumes exactly, also within an inner loop.

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
        self._params = take_trainable(self.param_groups)
        self._delta = {name: torch.zeros_like(p) for name, p in self._params.items()}
        self.layers = layers_of(self._params) if layers is None else layers
        check_precision(self._params)
        check_layers(self.layers, self._params)
        check_decay(self.param_groups, self.config)
        muon = muon_names(muon, self._params, self.config)
        # Group by group, since learning rates differ; kept by index, since loading replaces the groups.
        self._inner = [self._inner_optimizers(group, muon) for group in self.param_groups]
        self._batches: list[Batch] = []  # of the step in progress
        self._alphas = step_sizes(self.config.line_search_points)
        start = {
            "position": 0,
            "outer_steps": 0,
            "step_size": math.nan,
            "loss": math.nan,
            "losses": [0.0] * len(self._alphas),
            "damping": self.config.damping,
            "predicted": 0.0,
            "config": asdict(self.config),
        }
        self.param_groups[0].setdefault("gauss_newton", start)

    @property
    def progress(self) -> dict:
        """Return position within the outer step, outer_steps done, the last step_size with its loss, and damping."""
        return self.param_groups[0]["gauss_newton"]

    @property
    def in_line_search(self) -> bool:
        """Tell whether the next step compares step sizes; its loss has no gradient."""
        return self.progress["position"] >= self.config.inner_steps

    @property
    def begins_outer_step(self) -> bool:
        """Tell whether the next step is the first after a commit."""
        return self.progress["position"] == 0

    def start_line_search(self) -> None:
        """End the inner loop early: the next steps choose the step size. For the last steps of a training."""
        self.progress["position"] = max(self.progress["position"], self.config.inner_steps)

    def loss(self, forward: Forward, loss: Loss) -> Tensor:
        """Return the scalar to call `backward` on: the linearized objective, or in a line search the loss at θ.

        Args:
            forward: maps a dict of parameters, by the names given to the constructor, to the outputs (one tensor).
            loss: maps the outputs to a scalar that is convex in them.
        """
        batch = Batch(forward, loss, Weight())
        if self.in_line_search:
            with torch.no_grad():
                batch.losses = torch.stack([self._loss_at(alpha, forward, loss) for alpha in self._alphas])
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

    def _loss_at(self, alpha: float, forward: Forward, loss: Loss) -> Tensor:
        params = self._params
        if alpha:  # 0 · δ is not 0 where δ overflowed
            params = {name: p.add(self._delta[name], alpha=alpha) for name, p in self._params.items()}
        with self.unchanged_randomness():
            return loss(forward(params))

    def unchanged_randomness(self):
        """Make random numbers drawn inside be drawn again afterwards."""
        device = next(iter(self._params.values())).device
        return torch.random.fork_rng([device] if device.type == "cuda" else [])

    @torch.no_grad()
    def step(self, closure=None):
        """Take one inner step, or one step of the line search; the last of those commits.

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
                name: mean_over_ranks(t).add(vector[name], alpha=self.config.anchor_l2) for name, t in total.items()
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
        losses = mean_over_ranks(sum(batch.weight.value * batch.losses for batch in self._batches)).tolist()
        progress["losses"] = [total + loss for total, loss in zip(progress["losses"], losses)]
        progress["position"] += 1
        self._batches.clear()
        if progress["position"] >= self.config.inner_steps + self.config.line_search_steps:
            self._commit(best_step_size(self._alphas, progress["losses"]))

    def _commit(self, alpha: float) -> None:
        """Add α δ to θ. The inner iterate θ + δ stays where it is, unless the step was rejected or solved for.

        Where δ or the inner optimizers' state is not finite, the step is rejected and both start anew.
        """
        progress = self.progress
        losses = progress["losses"]
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
        progress["position"] = 0
        progress["outer_steps"] += 1
        progress["step_size"] = alpha
        progress["predicted"] = 0.0
        progress["loss"] = losses[self._alphas.index(alpha)] / self.config.line_search_steps
        progress["losses"] = [0.0] * len(losses)

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

    def _inner_optimizers(self, group: dict, muon: set[str]) -> list[torch.optim.Optimizer]:
        if self.config.inner_optimizer == "cg":
            return []
        delta = {name: self._delta[name] for name in group["param_names"]}
        return make_inner_optimizers(delta, muon, group["betas"], group["eps"])
