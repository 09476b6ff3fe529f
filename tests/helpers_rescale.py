"""Small adapted models, steps by hand and what is read off them, for the tests of rescale.py."""

import copy

import numpy as np
import torch
from peft import get_peft_model
from torch import nn

from peft_scalora import ScaLoRAConfig
from peft_scalora.layer import ScaLoRALayer

NEVER = 10**6
X = torch.randn(32, 12, generator=torch.Generator().manual_seed(0))
Y = torch.randn(32, 7, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """Three layers, two of them of one shape."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 7)

    def forward(self, x):
        return self.last(torch.tanh(self.second(torch.tanh(self.first(x)))))


class Chain(nn.Module):
    """Linear layers without bias, all of one shape."""

    def __init__(self, layers, n=16, m=16):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(n, m, bias=False) for _ in range(layers))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def adapted(net, autocast_adapter_dtype=True, **config):
    names = [name for name, module in net.named_modules() if isinstance(module, nn.Linear)]
    settings = {"r": 3, "lora_alpha": 5, "scaling": "column", "scaling_interval": NEVER, "target_modules": names}
    return get_peft_model(net, ScaLoRAConfig(**settings | config), autocast_adapter_dtype=autocast_adapter_dtype)


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, ScaLoRALayer)]


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def fill_factors(model, size=0.1):
    """lora_B as after some training."""
    for layer in layers_of(model):
        nn.init.normal_(layer.factors("default")[0], std=size)
    return model


def random_gradients(model, generator=None):
    """The gradients that random dense G would give: s Gᵀ-consistent in both factors."""
    for layer in layers_of(model):
        lora_B, lora_A = layer.factors("default")
        G = torch.randn(lora_B.shape[0], lora_A.shape[1], generator=generator, dtype=torch.float64)
        s = layer.scaling["default"]
        lora_B.grad = (s * G @ lora_A.detach().double().T).to(lora_B.dtype)
        lora_A.grad = (s * lora_B.detach().double().T @ G).to(lora_A.dtype)


def move(model, size=0.3, generator=None):
    """Change the factors at random, as the steps between two rescalings do; returns the change of each weight.

    Without it a second rescaling finds columns of the right norm and has nothing to fold.
    """
    moved = []
    for layer in layers_of(model):
        before = change(layer)
        for p in layer.factors("default"):
            rms = p.detach().double().square().mean().sqrt().to(p.dtype)
            p.data.add_(torch.randn(p.shape, generator=generator).to(p.dtype), alpha=size * float(rms))
        moved.append(change(layer) - before)
    return moved


def backward(model, x=X, y=Y):
    model.zero_grad()
    loss = (model(x) - y).square().mean()
    loss.backward()
    return loss


def train(model, optimizer, steps):
    for _ in range(steps):
        backward(model)
        optimizer.step()


def factors_of(layer, adapter="default"):
    return [p.detach().flatten(1).double().numpy().copy() for p in layer.factors(adapter)]


def accumulated(layer, adapter="default"):
    U, V = (getattr(layer, name)[adapter].double().numpy() for name in ("scalora_U", "scalora_V"))
    return U @ V if len(V) else U


def change(layer, adapter="default"):
    """s B A + U V in float64, from the tensors themselves."""
    B, A = factors_of(layer, adapter)
    return layer.scaling[adapter] * B @ A + accumulated(layer, adapter)


def snapshot(model, optimizer=None):
    """Copies of everything that a rescaling may write."""
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    for name, p in model.named_parameters():
        if p.grad is not None:
            saved[f"{name}.grad"] = p.grad.clone()
        if optimizer is not None:
            for key, value in optimizer.state.get(p, {}).items():
                saved[f"{name}.state.{key}"] = copy.deepcopy(value)
    return saved


def same(a, b):
    """Equal bits, where nan equals nan."""
    if not isinstance(a, torch.Tensor):
        return a == b
    return a.dtype == b.dtype and torch.equal(a.nan_to_num(12345.0), b.nan_to_num(12345.0))


def scales_between(before, after):
    """α and β from the factors (B, A) of a layer before and after."""
    (B0, A0), (B1, A1) = before, after
    return np.sum(B0 * B1, 0) / np.sum(B0 * B0, 0), np.sum(A0 * A1, 1) / np.sum(A0 * A0, 1)


def relative(a, b):
    return float((a - b).norm() / b.norm())
