"""Linearized losses and gradients against an explicit J and the textbook H, in float64."""

import copy

import curvlinops
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers_models import KINDS, Linears, floats, tiny_gpt2, tokens
from torch import nn
from torch.func import functional_call, jacrev

from peft_scalora.gauss_newton import ggn_product, layers_of, linearized_loss_and_grad

VARIANTS = ("gn", "prox_linear")
every_variant = pytest.mark.parametrize("variant", VARIANTS)


def mlp():
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 5))
    return model, floats(9, 6)


def gpt2():
    model = tiny_gpt2()
    model.set_attn_implementation("eager")
    return model, tokens(2, 5)


def scalora_gpt2():
    _, model = KINDS["GPT-2"].filled()
    model.base_model.model.set_attn_implementation("eager")
    return model, tokens(2, 5)


MODELS = {"mlp": mlp, "gpt2": gpt2, "scalora": scalora_gpt2}
every_model = pytest.mark.parametrize("name", MODELS)


class Problem:
    """A model, a δ and J as an explicit matrix (outputs x parameters), all in float64."""

    def __init__(self, name):
        model, inputs = MODELS[name]()
        self.model = model.double().eval()
        inputs = inputs.double() if inputs.is_floating_point() else inputs
        self.params = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        generator = torch.Generator().manual_seed(3)
        self.delta = {
            n: 0.1 * torch.randn(p.shape, generator=generator, dtype=torch.float64) for n, p in self.params.items()
        }

        def forward(params):
            result = functional_call(self.model, params, (inputs,))
            return result if isinstance(result, torch.Tensor) else result.logits

        self.forward = forward
        detached = {n: p.detach() for n, p in self.params.items()}
        self.outputs = forward(detached).detach()
        J = jacrev(forward)(detached)
        self.J = {n: block.reshape(self.outputs.numel(), -1).numpy() for n, block in J.items()}

    def Jd(self, names=None):
        return sum(self.J[n] @ self.delta[n].flatten().numpy() for n in names or self.J)


class CrossEntropy:
    """Mean over the rows that are not ignored; its gradient and Hessian by hand."""

    def __init__(self, outputs, ignored):
        self.classes = outputs.shape[-1]
        rows = outputs.numel() // self.classes
        self.labels = np.arange(rows) % self.classes
        if ignored:
            self.labels[::3] = -100
        self.kept = self.labels != -100

    def loss(self, outputs):
        return F.cross_entropy(outputs.reshape(-1, self.classes), torch.tensor(self.labels))

    def by_hand(self, z):
        z = z.reshape(-1, self.classes)
        P = np.exp(z - z.max(1, keepdims=True))
        P /= P.sum(1, keepdims=True)
        value = -np.log(P[self.kept, self.labels[self.kept]]).mean()
        weights = self.kept / self.kept.sum()
        onehot = np.eye(self.classes)[np.where(self.kept, self.labels, 0)]
        H = np.zeros((z.size, z.size))
        for row, (p, weight) in enumerate(zip(P, weights)):
            block = slice(row * self.classes, (row + 1) * self.classes)
            H[block, block] = weight * (np.diag(p) - np.outer(p, p))
        return value, (weights[:, None] * (P - onehot)).ravel(), H


class SquaredError:
    def __init__(self, outputs, ignored=False):
        self.target = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)

    def loss(self, outputs):
        return F.mse_loss(outputs, self.target)

    def by_hand(self, z):
        residual = z.ravel() - self.target.numpy().ravel()
        return (residual**2).mean(), 2 * residual / residual.size, 2 / residual.size * np.eye(residual.size)


LOSSES = {
    "cross-entropy": lambda outputs: CrossEntropy(outputs, ignored=False),
    "cross-entropy with ignored labels": lambda outputs: CrossEntropy(outputs, ignored=True),
    "MSE": SquaredError,
}
every_loss = pytest.mark.parametrize("loss", LOSSES)


def expected(problem, loss, variant, names):
    """Objective and gradient by name, from J and H."""
    f, Jd = problem.outputs.numpy().ravel(), problem.Jd(names)
    if variant == "prox_linear":
        value, gradient, _ = loss.by_hand(f + Jd)
    else:
        value, slope, H = loss.by_hand(f)
        value, gradient = value + slope @ Jd + 0.5 * Jd @ H @ Jd, slope + H @ Jd
    return value, {n: problem.J[n].T @ gradient for n in names}


def assert_equal(found, wanted, tolerance=1e-8):
    """To `tolerance` of the whole gradient's norm."""
    assert found.keys() == wanted.keys()
    scale = np.sqrt(sum((w**2).sum() for w in wanted.values()))
    assert scale > 1e-3
    for name, w in wanted.items():
        assert np.linalg.norm(found[name].numpy().ravel() - w) < tolerance * scale, name


@every_variant
@every_loss
@every_model
def test_value_and_gradient_equal_explicit_matrices(name, loss, variant):
    problem = Problem(name)
    loss = LOSSES[loss](problem.outputs)
    value, gradient = linearized_loss_and_grad(problem.forward, loss.loss, problem.params, problem.delta, variant)
    wanted_value, wanted = expected(problem, loss, variant, list(problem.params))
    assert float(value) == pytest.approx(wanted_value, rel=1e-8)
    assert_equal(gradient, wanted)
    assert not value.requires_grad and not any(g.requires_grad for g in gradient.values())


@every_variant
@pytest.mark.parametrize("loss", ["cross-entropy with ignored labels", "MSE"])
@pytest.mark.parametrize("name", ["mlp", "gpt2"])
def test_layerwise_gradient_uses_one_layers_columns_of_J(name, loss, variant):
    problem = Problem(name)
    loss = LOSSES[loss](problem.outputs)
    layers = layers_of(problem.params)
    assert len(layers) == (3 if name == "mlp" else 4)  # GPT-2: embeddings, two blocks, norm and head
    for names in layers:
        delta = {n: problem.delta[n] for n in names}
        value, gradient = linearized_loss_and_grad(problem.forward, loss.loss, problem.params, delta, variant)
        wanted_value, wanted = expected(problem, loss, variant, names)
        assert float(value) == pytest.approx(wanted_value, rel=1e-8)
        assert_equal(gradient, wanted)


@every_loss
@every_model
def test_ggn_product_equals_explicit_matrices(name, loss):
    problem = Problem(name)
    loss = LOSSES[loss](problem.outputs)
    _, _, H = loss.by_hand(problem.outputs.numpy())
    HJv = H @ problem.Jd()
    found = ggn_product(problem.forward, loss.loss, problem.params, problem.delta)
    assert_equal(found, {n: J.T @ HJv for n, J in problem.J.items()})


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), nn.MSELoss()], ids=["cross-entropy", "MSE"])
def test_ggn_product_equals_curvlinops(loss):
    model, x = mlp()
    model, x = model.double(), x.double()
    params = dict(model.named_parameters())
    y = torch.arange(9) % 5 if isinstance(loss, nn.CrossEntropyLoss) else floats(9, 5).double()
    operator = curvlinops.GGNLinearOperator(model, loss, list(params.values()), [(x, y)])
    generator = torch.Generator().manual_seed(5)
    vector = {n: torch.randn(p.shape, generator=generator, dtype=torch.float64) for n, p in params.items()}
    flat = operator @ torch.cat([v.flatten() for v in vector.values()])
    product = ggn_product(lambda p: functional_call(model, p, (x,)), lambda z: loss(z, y), params, vector)
    found = torch.cat([g.flatten() for g in product.values()])
    assert float((found - flat).norm()) < 1e-6 * float(flat.norm())


@every_variant
def test_at_zero_delta_it_is_the_ordinary_gradient_of_any_loss(variant):
    model, x = Linears(), floats(5, 14)
    params = dict(model.named_parameters())

    def loss(z):
        return z.abs().sum() + z.square().sum().sqrt()

    zero = {n: torch.zeros_like(p) for n, p in params.items()}
    value, gradient = linearized_loss_and_grad(lambda p: functional_call(model, p, (x,)), loss, params, zero, variant)
    ordinary = loss(model(x))
    ordinary.backward()
    assert float(value) == pytest.approx(ordinary.item())
    for name, p in params.items():
        torch.testing.assert_close(gradient[name], p.grad)


@every_variant
def test_parameters_the_outputs_do_not_depend_on_get_zero(variant):
    model, x = copy.deepcopy(Linears()), floats(5, 14)
    params = dict(model.named_parameters()) | {"unused": nn.Parameter(torch.ones(3))}
    delta = {n: torch.ones_like(p) for n, p in params.items()}

    def forward(p):
        return functional_call(model, {n: t for n, t in p.items() if n != "unused"}, (x,))

    _, gradient = linearized_loss_and_grad(forward, lambda z: z.square().sum(), params, delta, variant)
    assert torch.equal(gradient["unused"], torch.zeros(3))
    assert gradient["lin0.weight"].norm() > 0


def test_refusals():
    with pytest.raises(ValueError, match="variant='newton' must be one of 'gn', 'prox_linear'"):
        linearized_loss_and_grad(lambda p: p["w"], torch.sum, {"w": torch.ones(2)}, {"w": torch.ones(2)}, "newton")
