"""Optimizers that step other optimizers, in the forms in which they are published."""

from collections import defaultdict

import torch


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimisation over a base optimizer: gradients at w + e(w), the step at w."""

    copies = True  # keeps w, or else e(w), while the gradients at w + e(w) are computed

    def __init__(self, params, base_optimizer, rho=0.05, **kwargs):
        super().__init__(params, {"rho": rho, **kwargs})
        self.base_optimizer = base_optimizer(self.param_groups, **kwargs)
        self.param_groups = self.base_optimizer.param_groups
        self.defaults.update(self.base_optimizer.defaults)

    def _with_gradients(self):
        return [p for group in self.param_groups for p in group["params"] if p.grad is not None]

    @torch.no_grad()
    def first_step(self):
        norm = torch.stack([p.grad.norm() for p in self._with_gradients()]).norm()
        for p in self._with_gradients():
            e_w = p.grad * (self.param_groups[0]["rho"] / (norm + 1e-12))
            if self.copies:
                self.state[p]["old_p"] = p.data.clone()
            else:
                self.state[p]["e_w"] = e_w
            p.add_(e_w)
        self.zero_grad()

    @torch.no_grad()
    def second_step(self):
        for p in self._with_gradients():
            if self.copies:
                p.data = self.state[p]["old_p"]
            else:
                p.sub_(self.state[p]["e_w"])
        self.base_optimizer.step()
        self.zero_grad()

    @torch.no_grad()
    def step(self, closure=None):
        self.first_step()
        torch.enable_grad()(closure)()
        self.second_step()


class SAMOfDifferences(SAM):
    copies = False


class SAMOfOneClass(torch.optim.AdamW):
    """SAM that is its own base optimizer, and calls the closure for both gradients."""

    rho = 0.05

    @torch.no_grad()
    def step(self, closure):
        closure = torch.enable_grad()(closure)
        loss = closure()
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in params]).norm()
        moves = [p.grad * (self.rho / (norm + 1e-12)) for p in params]
        torch._foreach_add_(params, moves)
        closure()
        torch._foreach_sub_(params, moves)
        super().step()
        return loss


class SlowWeights:
    """Every k steps the weights go back half the way to the slow weights."""

    k, alpha, steps = 2, 0.5, 0

    def zero_grad(self):
        self.optimizer.zero_grad()

    def _params(self):
        return [p for group in self.param_groups for p in group["params"]]

    def step(self, closure=None):
        loss = self.optimizer.step(closure)
        self.steps += 1
        if self.steps % self.k == 0:
            with torch.no_grad():
                for p in self._params():
                    p.copy_(self._slow(p).lerp_(p, self.alpha))
        return loss


class Lookahead(SlowWeights, torch.optim.Optimizer):
    """Keeps the slow weights in its state."""

    def __init__(self, optimizer):
        super().__init__(optimizer.param_groups, {})
        self.optimizer, self.param_groups = optimizer, optimizer.param_groups
        for p in self._params():
            self.state[p]["slow_buffer"] = p.detach().clone()

    def _slow(self, p):
        return self.state[p]["slow_buffer"]


class LookaheadInTheGroups(SlowWeights, torch.optim.Optimizer):
    """Keeps the slow weights among the settings of the parameter groups."""

    def __init__(self, optimizer):
        super().__init__(optimizer.param_groups, {})
        self.optimizer, self.param_groups = optimizer, optimizer.param_groups
        for group in self.param_groups:
            group["slow"] = {p: p.detach().clone() for p in group["params"]}

    def _slow(self, p):
        return next(group["slow"][p] for group in self.param_groups if p in group["slow"])


class LookaheadWithAList(SlowWeights, torch.optim.Optimizer):
    """Keeps the slow weights in a list. Without the constructor of its base class torch runs no hook of its own."""

    def __init__(self, optimizer):
        self.optimizer, self.param_groups, self.state = optimizer, optimizer.param_groups, optimizer.state
        self.slow_weights = [[p.detach().clone() for p in group["params"]] for group in self.param_groups]

    def _slow(self, p):
        slow = [each for group in self.slow_weights for each in group]
        return next(each for each, param in zip(slow, self._params()) if param is p)


class LookaheadInTheInnerState(SlowWeights, torch.optim.Optimizer):
    """Keeps the slow weights beside the moments. It does not call the constructor of its base class either."""

    def __init__(self, optimizer):
        self.optimizer, self.param_groups, self.state = optimizer, optimizer.param_groups, defaultdict(dict)

    def _slow(self, p):
        return self.optimizer.state[p].setdefault("lookahead_slow_buff", p.detach().clone())


class ScheduleFree:
    """No optimizer for torch: keeps the averaged sequence in a state of its own."""

    def __init__(self, base):
        self.base, self.param_groups, self.state = base, base.param_groups, defaultdict(dict)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p].setdefault("z", p.clone())
        self.base.step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                p.lerp_(self.state[p]["z"], 0.1)

    def zero_grad(self):
        self.base.zero_grad()


class Plain(torch.optim.Optimizer):
    """Steps another optimizer and keeps nothing, as accelerate's does."""

    def __init__(self, optimizer):
        super().__init__(optimizer.param_groups, {})
        self.optimizer = optimizer

    def step(self, closure=None):
        return self.optimizer.step(closure)


class Several(torch.optim.Optimizer):
    """Steps a list of optimizers of some parameters each."""

    def __init__(self, optimizers):
        super().__init__([group for each in optimizers for group in each.param_groups], {})
        self.optimizers = optimizers

    def step(self, closure=None):
        loss = None if closure is None else closure()
        for each in self.optimizers:
            each.step()
        return loss
