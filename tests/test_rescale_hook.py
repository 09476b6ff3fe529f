"""When a rescaling happens: every interval of steps of whichever optimizer, and nowhere else."""

import copy
import math

import pytest
import torch
from accelerate import Accelerator
from helpers_rescale import (
    Net,
    X,
    Y,
    adapted,
    backward,
    fill_factors,
    layers_of,
    relative,
    same,
    snapshot,
    train,
    trainable,
)
from peft import LoraConfig, get_peft_model

from peft_scalora import ScaLoRAConfig, last_report, rescale


def rescalings(model):
    return [layer.progress("default").rescalings for layer in layers_of(model)]


@pytest.mark.parametrize("interval", [1, 3, 10])
def test_every_interval_of_optimizer_steps(interval):
    model = adapted(Net(), scaling_interval=interval)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-3)
    assert last_report(optimizer) is None
    for step in range(1, 22):
        train(model, optimizer, 1)
        assert rescalings(model) == [step // interval] * 3
    report = last_report(optimizer)
    assert report.layers == 3 and report.skipped == 0


def test_micro_steps_of_gradient_accumulation_do_not_count():
    model = adapted(Net(), scaling_interval=2)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-3)
    for micro_step in range(1, 17):
        (model(X) - Y).square().mean().backward()
        if micro_step % 4 == 0:
            optimizer.step()
            optimizer.zero_grad()
        assert rescalings(model) == [micro_step // 8] * 3


def test_two_optimizers_rescale_what_they_step():
    model = adapted(Net(), scaling_interval=2)
    first, second, last = layers_of(model)
    one = torch.optim.AdamW([*first.factors("default"), *last.factors("default")], lr=1e-3)
    two = torch.optim.SGD(second.factors("default"), lr=1e-3, momentum=0.9)
    for step in range(1, 7):
        backward(model)
        one.step()
        if step % 3 == 0:
            two.step()
        assert rescalings(model) == [step // 2, step // 6, step // 2]
    assert last_report(one).layers == 2 and last_report(two).layers == 1


def test_factors_of_different_optimizers_and_frozen_factors_are_left_alone():
    """A rescaling has to carry the moments of both factors in one go."""
    model = adapted(Net(), scaling_interval=1)
    for layer in layers_of(model)[:2]:
        layer.factors("default")[1].requires_grad_(False)
    lora_B, lora_A = layers_of(model)[2].factors("default")
    optimizers = [torch.optim.SGD([*(layer.factors("default")[0] for layer in layers_of(model)[:2]), lora_B], lr=1e-3)]
    optimizers.append(torch.optim.SGD([lora_A], lr=1e-3))
    frozen = layers_of(model)[0].factors("default")[1].detach().clone()
    with pytest.warns(
        UserWarning, match="SGD steps only one factor of layers of the ScaLoRA adapter 'default'"
    ) as caught:
        for _ in range(3):
            backward(model)
            for optimizer in optimizers:
                optimizer.step()
    assert len(caught) == 2  # once an optimizer
    assert rescalings(model) == [0, 0, 0]
    backward(model)
    assert rescale(model).layers == 1
    assert torch.equal(layers_of(model)[0].factors("default")[1], frozen)


def plain_adam(params, grads, steps):
    """Adam by hand, for what the hook must not touch."""
    first, second = ([torch.zeros_like(p) for p in params] for _ in range(2))
    for t in range(1, steps + 1):
        for p, g, m, v in zip(params, grads[t - 1], first, second):
            m.mul_(0.9).add_(0.1 * g)
            v.mul_(0.999).add_(0.001 * g * g)
            p.sub_(1e-2 * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8))
    return params


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_model_without_scalora_is_untouched(kind):
    """Beside a ScaLoRA model that is alive, so that the hook has something to look for."""
    bystander = adapted(Net(), scaling_interval=1)
    net = Net()
    if kind == "lora":
        net = get_peft_model(net, LoraConfig(r=3, target_modules=["first", "second"]))
    params = trainable(net)
    start, grads = [p.detach().double().clone() for p in params], []
    optimizer = torch.optim.Adam(params, lr=1e-2)
    saved = snapshot(bystander)
    for _ in range(5):
        backward(net)
        grads.append([p.grad.double().clone() for p in params])
        optimizer.step()
        assert all(torch.equal(p.grad.double(), g) for p, g in zip(params, grads[-1]))
    for p, want in zip(params, plain_adam(start, grads, 5)):
        torch.testing.assert_close(p.double(), want, rtol=1e-5, atol=1e-6)
    assert all(same(value, saved[name]) for name, value in snapshot(bystander).items())
    assert last_report(optimizer) is None


def test_one_model_of_two_that_share_an_optimizer():
    models = [fill_factors(adapted(Net())) for _ in range(2)]
    optimizer = torch.optim.AdamW([p for model in models for p in trainable(model)], lr=1e-3)
    for model in models:
        backward(model)
    saved = [snapshot(model) for model in models]
    assert rescale(models[0], optimizer).layers == 3
    changed = [
        [not torch.equal(value, old[name]) for name, value in snapshot(model).items()]
        for model, old in zip(models, saved)
    ]
    assert any(changed[0]) and not any(changed[1])


def test_only_the_adapter_that_is_trained():
    model = adapted(Net(), scaling_interval=1)
    model.add_adapter(
        "other", ScaLoRAConfig(r=2, scaling="column", scaling_interval=1, target_modules=["first", "second", "last"])
    )
    model.set_adapter("other")
    saved = {name: value for name, value in snapshot(model).items() if ".default." in name}
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-3)
    train(model, optimizer, 3)
    assert [layer.progress("other").rescalings for layer in layers_of(model)] == [3, 3, 3]
    now = snapshot(model)
    assert saved and all(same(value, now[name]) for name, value in saved.items())


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_gradient_scaler_skips(fused):
    """Without `fused` the optimizer is not called at all; with it the hook runs, on gradients that are still scaled."""
    model = adapted(Net(), scaling_interval=2)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-3, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

    def step(overflow):
        optimizer.zero_grad()
        scaler.scale((model(X) - Y).square().mean()).backward()
        if overflow:
            for p in trainable(model):
                p.grad.fill_(math.inf)
        scaler.step(optimizer)
        scaler.update()

    step(False)
    assert rescalings(model) == [0, 0, 0]
    before, factors = model(X).detach(), [p.detach().clone() for p in trainable(model)]
    step(True)
    assert scaler.get_scale() == 2.0**9
    assert all(torch.equal(p, q) for p, q in zip(trainable(model), factors))
    assert torch.equal(model(X), before)
    if not fused:
        assert [layer.progress("default").steps for layer in layers_of(model)] == [1, 1, 1]
    for _ in range(4):
        step(False)
    assert all(count >= 2 for count in rescalings(model))
    assert all(p.isfinite().all() for p in trainable(model))
    assert last_report(optimizer).skipped == 0


def test_accelerate():
    """Accelerate wraps the optimizer that holds the state."""
    accelerator = Accelerator(cpu=True)
    model = adapted(Net(), scaling_interval=2)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(trainable(model), lr=1e-2))
    for _ in range(4):
        optimizer.zero_grad()
        accelerator.backward((model(X) - Y).square().mean())
        optimizer.step()
    assert rescalings(model) == [2, 2, 2]
    assert last_report(optimizer).layers == 3
    accelerator.backward((model(X) - Y).square().mean())
    state = optimizer.optimizer.state[layers_of(model)[0].factors("default")[1]]["exp_avg"]
    was = state.clone()
    assert rescale(model, optimizer).layers == 3
    assert not torch.equal(state, was)


class Wrapper(torch.optim.Optimizer):
    """An optimizer that steps another one, as Lookahead and ZeroRedundancyOptimizer do: both run step hooks."""

    def __init__(self, inner):
        super().__init__(inner.param_groups, {})
        self.inner = inner

    def step(self, closure=None):
        self.inner.step()


@pytest.mark.parametrize("interval", [1, 2, 3])
def test_an_optimizer_inside_another_counts_once(interval):
    """And it is the inner one, which holds the moments, that has to be rescaled with."""
    start, results = adapted(Net(), scaling_interval=interval), []
    for wrap in (lambda optimizer: optimizer, Wrapper):
        model = copy.deepcopy(start)
        train(model, wrap(torch.optim.AdamW(trainable(model), lr=1e-2)), 9)
        assert rescalings(model) == [9 // interval] * 3
        results.append(snapshot(model))
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


@pytest.mark.parametrize("call", ["positional", "keyword", "stale gradients"])
def test_gradients_of_a_closure_are_those_that_count(call):
    """As Lightning steps: the same training as with gradients that are there before the step."""
    start, results = adapted(Net(), scaling_interval=2), []
    for kind in ("before", call):
        model = copy.deepcopy(start)
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)

        def closure(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = (model(X) - Y).square().mean()
            loss.backward()
            return loss

        for _ in range(7):
            if kind != "stale gradients":
                optimizer.zero_grad()
            if kind == "before":
                closure()
                optimizer.step()
            elif kind == "keyword":
                assert optimizer.step(closure=closure).requires_grad
            else:
                assert optimizer.step(closure).requires_grad
        assert rescalings(model) == [3] * 3
        results.append(snapshot(model))
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


class AdamWOfMine(torch.optim.AdamW):
    def step(self, closure=None):
        return super().step(closure)


def test_a_step_that_calls_the_one_of_its_base_class_counts_once():
    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))])  # from here on that one runs the hooks, too
    model = adapted(Net(), scaling_interval=4)
    optimizer = AdamWOfMine(trainable(model), lr=1e-3)
    train(model, optimizer, 8)
    assert rescalings(model) == [2, 2, 2]
    with pytest.raises(RuntimeError, match="no gradient today"):
        optimizer.step(lambda: (_ for _ in ()).throw(RuntimeError("no gradient today")))
    train(model, optimizer, 4)  # a step that failed has not switched anything off
    assert rescalings(model) == [3, 3, 3]


class SignDescent(torch.optim.Optimizer):
    """Keeps no state, and nobody has a rule for it."""

    def __init__(self, params, lr=1e-3):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p.sub_(self.param_groups[0]["lr"] * p.grad.sign())


def test_an_optimizer_without_state_needs_no_rule():
    model = adapted(Net(), scaling_interval=2)
    optimizer = SignDescent(trainable(model), lr=0.0)
    fill_factors(model)
    before = model(X).detach()
    train(model, optimizer, 6)
    assert rescalings(model) == [3, 3, 3]
    assert relative(model(X).detach(), before) < 1e-5


def test_one_layer_that_nobody_rescales_is_told_when_it_is_saved_and_when_it_is_merged(tmp_path):
    model = adapted(Net(), scaling_interval=2)
    first, *others = layers_of(model)
    train(model, torch.optim.AdamW([p for layer in others for p in layer.factors("default")], lr=1e-3), 4)
    for p in first.factors("default"):
        p.data.add_(0.1)
    with pytest.warns(
        UserWarning, match="1 of 3 layers of the ScaLoRA adapter 'default' were trained but never rescaled"
    ):
        model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="1 of 3 layers of the ScaLoRA adapter 'default'"):
        model.merge_and_unload()


def test_accumulators_are_float32_whatever_the_default_is():
    torch.set_default_dtype(torch.bfloat16)
    try:
        config = ScaLoRAConfig(r=2, scaling="column", target_modules=["0"])
        model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), config, autocast_adapter_dtype=False)
    finally:
        torch.set_default_dtype(torch.float32)
    layer = layers_of(model)[0]
    assert layer.scalora_U["default"].dtype == layer.scalora_V["default"].dtype == torch.float32
