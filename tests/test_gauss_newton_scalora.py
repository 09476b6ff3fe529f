"""Gauss-Newton with ScaLoRA: rescaling at outer steps, and what it may not change."""

import pytest
import torch
import torch.nn.functional as F
from helpers_gauss_newton import make_trainer
from helpers_models import KINDS, floats, scalora_layers
from test_moments import transport
from torch.func import functional_call, jvp

from peft_scalora import GaussNewton, GaussNewtonConfig, effective_rank, last_report


def test_rescaling_happens_at_outer_steps(tmp_path):
    trainer = make_trainer(tmp_path, {"inner_steps": 2}, adapter="scalora", max_steps=15)
    trainer.train()
    assert {
        (layer.progress("default").steps, layer.progress("default").rescalings)
        for layer in scalora_layers(trainer.model).values()
    } == {(5, 5)}
    assert max(effective_rank(trainer.model).values()) > 2


def model_and_optimizer(lr):
    _, model = KINDS["Linear"].filled(accumulator_rank=64)  # which discards nothing
    model = model.double().train()
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    return model, GaussNewton(named, GaussNewtonConfig(inner_optimizer="adamw", inner_steps=3), lr=lr)


def step(model, optimizer, seed):
    x, y = floats(9, 14).double(), torch.randn(9, 10, generator=torch.Generator().manual_seed(seed)).double()
    optimizer.loss(lambda p: functional_call(model, p, (x,)), lambda z: F.mse_loss(z, y)).backward()
    optimizer.step()
    optimizer.zero_grad()


def linearized(model, optimizer):
    """f and J δ at fixed inputs."""
    params = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    delta = {n: optimizer.state[p]["delta"].clone() for n, p in model.named_parameters() if p.requires_grad}
    return jvp(lambda p: functional_call(model, p, (floats(7, 14).double(),)), (params,), (delta,))


def test_rescaling_changes_neither_the_function_nor_its_linearization():
    model, optimizer = model_and_optimizer(lr=0.3)
    while not (optimizer.begins_outer_step and 0 < optimizer.progress["step_size"] < 1):  # δ is carried over
        step(model, optimizer, seed=optimizer.progress["position"])
    before = linearized(model, optimizer)
    factors = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]
    optimizer.param_groups[0]["lr"] = 0.0  # the step rescales and does nothing else
    step(model, optimizer, seed=9)
    after = linearized(model, optimizer)
    report = last_report(optimizer)
    assert report.layers == 2 and report.column + report.scalar == 2
    moved = [float((p.detach() - f).norm() / f.norm()) for f, p in zip(factors, optimizer.param_groups[0]["params"])]
    assert max(moved) > 1e-2, "the rescaling has to be part of the test"
    assert before[1].norm() > 1e-2, "so has δ"
    for a, b in zip(before, after):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)  # accumulators are float32


@pytest.mark.parametrize("position", [1, 2, 3])
def test_inner_steps_and_line_searches_do_not_rescale(position):
    model, optimizer = model_and_optimizer(lr=1e-3)
    counts = []
    for k in range(position + 1):
        step(model, optimizer, seed=k)
        counts.append(last_report(optimizer))
    assert counts[0] is not None and all(report is counts[0] for report in counts)


@pytest.mark.parametrize("inner", ["adamw", "muon"])
def test_state_is_carried_through_a_rescaling(inner):
    """Gradients are multiplied by the other factor's scales; δ is divided by them."""
    p = torch.nn.Parameter(torch.randn(4, 3))
    optimizer = GaussNewton([("p", p)], GaussNewtonConfig(inner_optimizer=inner), lr=0.1)
    p.grad = torch.randn(4, 3)
    optimizer.step()
    before = {name: value.clone() for name, value in optimizer.state[p].items()}
    scale = torch.tensor([2.0, 0.5, 0.1])
    transport(optimizer, [p], scale[None], 1)
    powers = {"exp_avg": 1, "exp_avg_sq": 2} if inner == "adamw" else {"momentum_buffer": 1}
    for name, power in powers.items():
        torch.testing.assert_close(optimizer.state[p][name], before[name] * scale**power)
    torch.testing.assert_close(optimizer.state[p]["delta"], before["delta"] / scale)
    assert optimizer.state[p].keys() == {"step", "delta", *powers}
