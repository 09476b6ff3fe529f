"""The playbook's update rules transcribed, against torch's optimizers: equal, or differing as the docstring says."""

import numpy as np
import pytest
import torch
from helpers_stability import make_trainer
from torch import nn

from peft_scalora.stability import make_optimizer, optimizer_class
from peft_scalora.stability.optimizers import OPTIMIZERS

RATE, STEPS = 0.05, 12


def gradient(x):
    """Of a function that is not quadratic."""
    return np.sin(3 * x) + x


def playbook(name, x):
    """Its formulas, literally, with its defaults where torch has the same."""
    gamma, beta1, beta2, eps = 0.9, 0.9, 0.999, 1e-8
    m, v = np.zeros_like(x), np.zeros_like(x)
    for t in range(1, STEPS + 1):
        g = gradient(x)
        if name == "sgd":
            x = x - RATE * g
        elif name in ("momentum", "nesterov"):
            v = gamma * v + g
            x = x - RATE * (v if name == "momentum" else gamma * v + g)
        else:
            m = beta1 * m + (1 - beta1) * g
            v = beta2 * v + (1 - beta2) * g**2
            b = np.sqrt(1 - beta2**t) / (1 - beta1**t)
            x = x - RATE * b * m / (np.sqrt(v) + eps)
    return x


def as_torch_does(name, x):
    """Where the docstring says that torch differs."""
    mu, beta1, beta2, eps, decay = 0.9, 0.9, 0.999, 1e-8, 0.01
    m, v, product = np.zeros_like(x), np.zeros_like(x), 1.0
    for t in range(1, STEPS + 1):
        g = gradient(x)
        if name == "rmsprop":
            v = 0.9 * v + 0.1 * g**2
            m = mu * m + g / (np.sqrt(v) + eps)
            x = x - RATE * m
            continue
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
        root = np.sqrt(v / (1 - beta2**t)) + eps
        if name == "nadam":
            now, then = (beta1 * (1 - 0.5 * 0.96 ** (0.004 * s)) for s in (t, t + 1))
            product *= now
            x = x - RATE * ((1 - now) * g / (1 - product) + then * m / (1 - product * then)) / root
        else:
            x = x * (1 - RATE * decay if name == "adamw" else 1) - RATE * m / (1 - beta1**t) / root
    return x


def torchs(name, start):
    x = nn.Parameter(torch.tensor(start))
    optimizer = make_optimizer(name, [x], RATE)
    for _ in range(STEPS):
        x.grad = torch.tensor(gradient(x.detach().numpy()))
        optimizer.step()
    return x.detach().numpy()


START = np.random.default_rng(0).standard_normal((4, 3))


@pytest.mark.parametrize(
    ("name", "tolerance"), [("sgd", 1e-12), ("momentum", 1e-12), ("nesterov", 1e-12), ("adam", 1e-6)]
)
def test_torch_follows_the_playbook(name, tolerance):
    np.testing.assert_allclose(torchs(name, START), playbook(name, START), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["rmsprop", "adam", "nadam", "adamw"])
def test_torch_differs_as_described(name):
    np.testing.assert_allclose(torchs(name, START), as_torch_does(name, START), rtol=1e-7)


def test_muon_moves_along_all_directions_alike():
    x = nn.Parameter(torch.randn(6, 4))
    before = x.detach().clone()
    optimizer = make_optimizer("muon", [x], RATE, weight_decay=0.0)
    x.grad = torch.randn(6, 4)
    optimizer.step()
    sigma = torch.linalg.svdvals(x.detach() - before)
    assert float(sigma.max() / sigma.min()) < 2
    with pytest.raises(ValueError, match=r"shape \[\(4,\)\]: give it the matrices"):
        make_optimizer("muon", nn.Linear(3, 4).parameters(), RATE)


@pytest.mark.parametrize("name", sorted(set(OPTIMIZERS) - {"muon"}))
def test_trainer_takes_them_by_name(tmp_path, name):
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.optimizer_cls_and_kwargs = optimizer_class(name, 1e-3)
    trainer.train()
    assert type(trainer.optimizer.optimizer) is OPTIMIZERS[name][0]
    for group in trainer.optimizer.optimizer.param_groups:
        assert all(group[key] == value for key, value in OPTIMIZERS[name][1].items())


def test_names_that_are_not_known_are_refused():
    with pytest.raises(ValueError, match="optimizer='adamax' must be one of sgd, momentum"):
        make_optimizer("adamax", [nn.Parameter(torch.zeros(2))], 0.1)
