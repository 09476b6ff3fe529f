"""GaussNewton in a loop of one's own: against closed forms and a literal transcription of the algorithm."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers_models import floats
from torch import nn
from torch.func import functional_call, hessian, jacrev

from peft_scalora import GaussNewton, GaussNewtonConfig
from peft_scalora.gauss_newton import linearized_loss_and_grad


def mlp(dropout=0.0):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 5)).double()


def batches(count, seed=0, rows=12):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        x = torch.randn(rows, 6, generator=generator, dtype=torch.float64)
        yield x, (x[:, :5] * 3).argmax(-1)


def functions(model, x, y, loss=F.cross_entropy):
    return lambda params: functional_call(model, params, (x,)), lambda outputs: loss(outputs, y)


def train(model, optimizer, data, clip=None):
    for x, y in data:
        optimizer.loss(*functions(model, x, y)).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    return model


def make(model, **settings):
    config = {name: settings.pop(name) for name in list(settings) if name in GaussNewtonConfig.__dataclass_fields__}
    return GaussNewton(model.named_parameters(), GaussNewtonConfig(**config), **settings)


# Least squares with a linear model: the quadratic model is the loss itself.


def least_squares():
    torch.manual_seed(5)
    model = nn.Linear(6, 4).double()
    x, y = floats(30, 6).double(), torch.randn(30, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    design = np.hstack([x.numpy(), np.ones((30, 1))])
    return model, x, y, np.linalg.lstsq(design, y.numpy(), rcond=None)[0]


@pytest.mark.parametrize("parts", [1, 3])
def test_one_outer_step_with_an_exact_solve_reaches_the_least_squares_solution(parts):
    model, x, y, solution = least_squares()
    optimizer = make(model, inner_optimizer="cg", inner_steps=1, cg_iterations=60, damping=0.0)
    for _ in range(2):  # solve, then line search
        for rows, targets in zip(x.chunk(parts), y.chunk(parts)):  # accumulated
            (optimizer.loss(*functions(model, rows, targets, F.mse_loss)) / parts).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.progress["outer_steps"] == 1 and optimizer.progress["step_size"] == 1.0
    found = np.vstack([model.weight.detach().numpy().T, model.bias.detach().numpy()])
    np.testing.assert_allclose(found, solution, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("inner", ["muon", "adamw"])
def test_prox_linear_equals_gn_on_least_squares(inner):
    trained = []
    for variant in ("gn", "prox_linear"):
        model, x, y, _ = least_squares()
        optimizer = make(model, variant=variant, inner_optimizer=inner, inner_steps=5, lr=3e-2)
        for _ in range(12):
            optimizer.loss(*functions(model, x, y, F.mse_loss)).backward()
            optimizer.step()
            optimizer.zero_grad()
        trained.append(model.weight.detach())
    # Muon orthogonalises in bfloat16, which makes steps of differences of rounding.
    torch.testing.assert_close(*trained, rtol=1e-10 if inner == "adamw" else 1e-2, atol=1e-10)


# The algorithm, written out.


def transcription(model, data, config, lr, weight_decay, betas, eps):
    """Outer steps with explicit J and H, AdamW on δ by its formulas: the parameters and all step sizes."""
    theta = {n: p.detach().clone() for n, p in model.named_parameters()}
    delta, m, v = ({n: torch.zeros_like(t) for n, t in theta.items()} for _ in range(3))
    data, steps, alphas = iter(data), 0, []
    while True:
        for k in range(config.inner_steps):
            try:
                x, y = next(data)
            except StopIteration:
                return theta, alphas
            f, loss = functions(model, x, y)
            z, J = f(theta), jacrev(f)(theta)
            flat = {n: J[n].reshape(z.numel(), -1) for n in theta}
            Jd = sum(flat[n] @ delta[n].flatten() for n in theta).view_as(z)
            if config.variant == "gn":
                H = hessian(loss)(z).reshape(z.numel(), -1)
                cotangent = torch.func.grad(loss)(z).flatten() + H @ Jd.flatten()
            else:
                cotangent = torch.func.grad(loss)(z + Jd).flatten()
            steps += 1
            rate = lr * (0.5 * (1 + math.cos(math.pi * k / config.inner_steps)))
            for n in theta:
                g = (flat[n].T @ cotangent).view_as(delta[n]) + config.anchor_l2 * delta[n]
                m[n] = betas[0] * m[n] + (1 - betas[0]) * g
                v[n] = betas[1] * v[n] + (1 - betas[1]) * g**2
                decayed = (1 - rate * weight_decay) * (theta[n] + delta[n]) - theta[n]
                m_hat, v_hat = m[n] / (1 - betas[0] ** steps), v[n] / (1 - betas[1] ** steps)
                delta[n] = decayed - rate * m_hat / (v_hat.sqrt() + eps)
        x, y = next(data)
        losses = {
            a: F.cross_entropy(functional_call(model, {n: theta[n] + a * delta[n] for n in theta}, (x,)), y).item()
            for a in [0.0] + [2 ** (-i / 2) for i in range(config.line_search_points)]
        }
        alpha = min(losses, key=losses.get)
        alphas.append(alpha)
        for n in theta:
            theta[n] = theta[n] + alpha * delta[n]
            delta[n] = (1 - alpha) * delta[n] if alpha else torch.zeros_like(delta[n])


@pytest.mark.parametrize("variant", ["gn", "prox_linear"])
def test_equals_the_algorithm_written_out(variant):
    config = GaussNewtonConfig(variant=variant, inner_optimizer="adamw", inner_steps=4, anchor_l2=0.05)
    settings = {"lr": 0.3, "weight_decay": 0.02, "betas": (0.8, 0.9), "eps": 1e-6}
    model = mlp()
    theta, alphas = transcription(copy.deepcopy(model), list(batches(40)), config, **settings)
    assert {0.0, 1.0} & set(alphas) and any(0 < a < 1 for a in alphas), "the carried δ has to be part of the test"
    optimizer = GaussNewton(model.named_parameters(), config, **settings)
    train(model, optimizer, batches(40))
    assert optimizer.progress["outer_steps"] == 8 and optimizer.progress["step_size"] == alphas[-1]
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), theta[name], rtol=1e-7, atol=1e-9)


def test_layerwise_gradients_are_those_of_each_layer_alone():
    model = mlp()
    optimizer = make(model, layerwise=True, inner_optimizer="adamw", inner_steps=4, lr=0.1)
    data = list(batches(3))
    train(model, optimizer, data[:2])
    x, y = data[2]
    optimizer.loss(*functions(model, x, y)).backward()
    params, delta = (
        dict(model.named_parameters()),
        {n: optimizer.state[p]["delta"] for n, p in model.named_parameters()},
    )
    for layer in (["0.weight", "0.bias"], ["3.weight", "3.bias"]):
        alone = {n: delta[n] for n in layer}
        _, wanted = linearized_loss_and_grad(*functions(model, x, y), params, alone)
        for name in layer:
            torch.testing.assert_close(params[name].grad, wanted[name])


def test_layers_may_be_given():
    model = mlp()
    layers = [["0.weight", "3.bias"], ["0.bias", "3.weight"]]
    config = GaussNewtonConfig(layerwise=True, inner_optimizer="adamw", inner_steps=4)
    optimizer = GaussNewton(model.named_parameters(), config, lr=0.1, layers=layers)
    *data, (x, y) = batches(3)
    train(model, optimizer, data)
    optimizer.loss(*functions(model, x, y)).backward()
    params = dict(model.named_parameters())
    for layer in layers:
        delta = {n: optimizer.state[params[n]]["delta"] for n in layer}
        _, wanted = linearized_loss_and_grad(*functions(model, x, y), params, delta)
        for name in layer:
            torch.testing.assert_close(params[name].grad, wanted[name])


# Micro-batches, clipping, schedules: as with any optimizer.


def test_accumulated_micro_batches_equal_one_batch():
    gradients = []
    for parts in (1, 4):
        model = mlp()
        optimizer = make(model, inner_optimizer="adamw", inner_steps=4, lr=0.1)
        train(model, optimizer, batches(2))
        ((x, y),) = batches(1, seed=9)
        for rows, labels in zip(x.chunk(parts), y.chunk(parts)):
            (optimizer.loss(*functions(model, rows, labels)) / parts).backward()
        gradients.append([p.grad for p in model.parameters()])
    for whole, accumulated in zip(*gradients):
        torch.testing.assert_close(whole, accumulated)


def test_the_loss_of_a_line_search_is_that_of_the_committed_weights():
    model = mlp()
    optimizer = make(model, inner_steps=2, inner_optimizer="adamw", lr=0.1)
    train(model, optimizer, batches(2))
    for x, y in batches(3, seed=9, rows=2):  # accumulated
        value = optimizer.loss(*functions(model, x, y))
        value.backward()
        torch.testing.assert_close(value, F.cross_entropy(model(x), y))
        assert not any(p.grad.any() for p in model.parameters())


def test_a_scheduler_sets_the_rate_of_the_inner_steps():
    moved = []
    for factor in (1.0, 0.5):
        model = mlp()
        optimizer = make(model, inner_optimizer="adamw", inner_steps=3, inner_schedule="constant", lr=0.1)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step, factor=factor: factor)
        train(model, optimizer, batches(1))
        scheduler.step()
        moved.append([optimizer.state[p]["delta"].clone() for p in model.parameters()])
    for whole, half in zip(*moved):
        torch.testing.assert_close(whole, 2 * half)


def test_parameters_are_committed_weights_and_steps_are_counted():
    model = mlp()
    optimizer = make(model, inner_steps=3, line_search_steps=2, lr=0.02)
    start = [p.detach().clone() for p in model.parameters()]
    for step, batch in enumerate(batches(5)):
        assert all(torch.equal(a, p) for a, p in zip(start, model.parameters())), step
        assert optimizer.begins_outer_step == (step == 0)
        assert optimizer.in_line_search == (step >= 3)
        train(model, optimizer, [batch])
    assert not any(torch.equal(a, p) for a, p in zip(start, model.parameters()))
    assert optimizer.begins_outer_step and optimizer.progress["outer_steps"] == 1


def test_the_inner_loop_can_be_ended_early():
    model = mlp()
    optimizer = make(model, inner_steps=50, lr=0.02)
    train(model, optimizer, batches(2))
    optimizer.start_line_search()
    train(model, optimizer, batches(1))
    assert optimizer.progress["outer_steps"] == 1 and optimizer.progress["step_size"] > 0


def test_a_step_that_worsens_the_loss_is_rejected():
    model = mlp()
    optimizer = make(model, inner_steps=2, inner_optimizer="adamw", lr=1e4)
    start = [p.detach().clone() for p in model.parameters()]
    train(model, optimizer, batches(3))
    assert optimizer.progress["step_size"] == 0.0
    assert all(torch.equal(a, p) for a, p in zip(start, model.parameters()))
    assert all(not optimizer.state[p]["delta"].any() for p in model.parameters())


@pytest.mark.parametrize("bad", ["input", "gradient"])
@pytest.mark.parametrize("inner", ["adamw", "muon"])
def test_a_bad_batch_costs_its_outer_step_and_nothing_else(inner, bad):
    settings = {"inner_steps": 2, "inner_optimizer": inner, "lr": 0.05}
    (x, y), *data = batches(9)
    model, spared = mlp(), mlp()
    optimizer = make(model, **settings)
    if bad == "input":
        x = x.clone()
        x[0, 0] = math.inf
    optimizer.loss(*functions(model, x, y)).backward()
    if bad == "gradient":  # its square overflows, so that AdamW would never move that bias again
        model[0].bias.grad[0] = 1e200
    optimizer.step()
    optimizer.zero_grad()
    train(model, optimizer, data[:2])
    assert optimizer.progress["step_size"] == 0.0
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), spared.parameters()))
    train(model, optimizer, data[2:])
    train(spared, make(spared, **settings), data[2:])
    assert optimizer.progress["outer_steps"] == 3 and optimizer.progress["step_size"] > 0
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), spared.parameters()))


def test_a_change_that_is_not_finite_is_rejected_where_the_line_search_does_not_see_it():
    model = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 5))
    optimizer = make(model, inner_steps=1, inner_optimizer="adamw", lr=0.1)
    start = [p.detach().clone() for p in model.parameters()]
    x, y = torch.tensor([1, 2]), torch.tensor([0, 1])
    optimizer.loss(*functions(model, x, y)).backward()
    model[0].weight.grad[3] = math.nan  # a token that is not in the batch
    optimizer.step()
    train(model, optimizer, [(x, y)])
    assert optimizer.progress["outer_steps"] == 1 and optimizer.progress["step_size"] == 0.0
    assert all(torch.equal(a, p) for a, p in zip(start, model.parameters()))


def test_step_sizes_share_dropout_masks_and_leave_random_numbers_alone():
    model = mlp(dropout=0.5)
    optimizer = make(model, inner_steps=1, inner_optimizer="adamw", lr=0.0)
    train(model, optimizer, batches(1))
    before = torch.get_rng_state()
    ((x, y),) = batches(1)
    optimizer.loss(*functions(model, x, y))
    assert torch.equal(torch.get_rng_state(), before)
    assert len(set(optimizer._batches[0].losses.tolist())) == 1  # δ = 0: only the masks could differ


def test_frozen_parameters_are_left_out():
    model = mlp()
    model[0].requires_grad_(False)
    start = [p.clone() for p in model[0].parameters()]
    settings = GaussNewtonConfig(inner_steps=2, layerwise=True)
    data = list(batches(3))
    optimizer = GaussNewton(model.named_parameters(), settings)
    train(model, optimizer, data)
    assert optimizer.param_groups[0]["param_names"] == ["3.weight", "3.bias"]
    assert len(optimizer.state) == 2
    assert all(torch.equal(a, p) for a, p in zip(start, model[0].parameters()))
    head = mlp()
    train(head, GaussNewton([(f"3.{n}", p) for n, p in head[3].named_parameters()], settings), data)
    assert optimizer.progress["step_size"] > 0
    assert all(torch.equal(a, b) for a, b in zip(model[3].parameters(), head[3].parameters()))
    with pytest.raises(ValueError, match="no parameter requires a gradient"):
        GaussNewton(model.requires_grad_(False).named_parameters())


# Saving.


def through_adamw(optimizer, model, state):
    """Trainer loads a checkpoint into the optimizer it made before the callback replaces that one."""
    adamw = torch.optim.AdamW(model.named_parameters())
    adamw.load_state_dict(state)
    optimizer.load_state_dict(adamw.state_dict())


@pytest.mark.parametrize("through", [lambda o, m, s: o.load_state_dict(s), through_adamw], ids=["directly", "AdamW"])
@pytest.mark.parametrize("stop", [3, 6, 7, 8])  # in the first inner loop, after a commit, in a line search, before one
@pytest.mark.parametrize("inner", ["muon", "cg"])
def test_resumed_equals_unbroken(tmp_path, inner, stop, through):
    settings = {"inner_optimizer": inner, "inner_steps": 4, "line_search_steps": 2, "lr": 0.3}
    data = list(batches(15))
    whole = mlp()
    train(whole, make(whole, **settings), data)

    first = mlp()
    optimizer = make(first, **settings)
    train(first, optimizer, data[:stop])
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "saved.pt")
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    second = mlp()
    second.load_state_dict(saved["model"])
    resumed = make(second, **settings)
    through(resumed, second, saved["optimizer"])
    train(second, resumed, data[stop:])
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters()))


def test_a_foreign_state_is_refused():
    model = mlp()
    other = make(mlp(), inner_steps=3, inner_optimizer="adamw")
    with pytest.raises(ValueError, match=r"another GaussNewtonConfig \(inner_optimizer\): resume with the same one"):
        make(model, inner_steps=3).load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="is not a GaussNewton: start from the saved model"):
        make(model).load_state_dict(torch.optim.AdamW(model.named_parameters()).state_dict())


def test_conjugate_gradient_training_lowers_the_loss_and_adapts_damping():
    model = mlp()
    optimizer = make(model, inner_optimizer="cg", inner_steps=1, cg_iterations=20, damping=1e-2)
    losses = []
    for batch in batches(16, rows=64):
        train(model, optimizer, [batch])
        losses.append(optimizer.progress["loss"])
    assert losses[-1] < 0.5 < 1 < losses[1]
    assert optimizer.progress["damping"] != 1e-2


# Refusals.


def test_refusals():
    model = mlp()
    with pytest.raises(ValueError, match=r"needs named parameters: pass model\.named_parameters"):
        GaussNewton(model.parameters())
    with pytest.raises(ValueError, match=r"parameter '0.weight' is torch.bfloat16: .* float32"):
        GaussNewton(nn.Sequential(nn.Linear(2, 2)).bfloat16().named_parameters())
    with pytest.raises(ValueError, match=r"muon=\['0.bias'\]: not matrices"):
        GaussNewton(model.named_parameters(), muon=["0.bias"])
    with pytest.raises(ValueError, match=r"layers=\[\['0.weight'\]\]: have to hold every parameter once"):
        GaussNewton(model.named_parameters(), layers=[["0.weight"]])
    with pytest.raises(ValueError, match=r"weight_decay=0.1: inner_optimizer='cg' .* pass weight_decay=0"):
        make(model, inner_optimizer="cg", weight_decay=0.1)
    optimizer = GaussNewton(model.named_parameters(), GaussNewtonConfig(inner_steps=1))
    with pytest.raises(ValueError, match="takes no closure"):
        optimizer.step(lambda: 0.0)
    with pytest.raises(RuntimeError, match="needs gradients"):
        optimizer.step()
    optimizer.start_line_search()
    with pytest.raises(RuntimeError, match="needs losses"):
        optimizer.step()
