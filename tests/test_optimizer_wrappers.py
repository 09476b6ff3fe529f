"""Optimizers that step others: rescaled with the one that holds the moments, at the weights that are stepped, or
refused for what they keep."""

import copy

import pytest
import torch
from helpers_rescale import Net, X, Y, adapted, change, layers_of, snapshot, trainable
from helpers_wrappers import (
    SAM,
    Lookahead,
    LookaheadInTheGroups,
    LookaheadInTheInnerState,
    LookaheadWithAList,
    Plain,
    SAMOfDifferences,
    SAMOfOneClass,
    ScheduleFree,
    Several,
)

from peft_scalora import automatic_rescaling, last_report, rescale, with_rescaling


def closure_of(model, optimizer):
    def closure():
        optimizer.zero_grad()
        loss = (model(X) - Y).square().mean()
        loss.backward()
        return loss

    return closure


def step_with_closure(model, optimizer):
    closure = closure_of(model, optimizer)
    if isinstance(optimizer, SAM):
        closure()
    optimizer.step(closure)


def two_steps(model, optimizer):
    closure = closure_of(model, optimizer)
    closure()
    optimizer.first_step()
    closure()
    optimizer.second_step()


def rescalings(model):
    return [layer.progress("default").rescalings for layer in layers_of(model)]


def sam_by_hand(start, steps, interval, rho=0.05, lr=1e-2):
    """SAM from the paper's definition on AdamW: `rescale` is called where the gradients are those of the step."""
    model = copy.deepcopy(start)
    params = trainable(model)
    optimizer = torch.optim.AdamW(params, lr=lr)
    closure = closure_of(model, optimizer)
    for step in range(1, steps + 1):
        closure()
        norm = torch.stack([p.grad.norm() for p in params]).norm()
        kept = [p.detach().clone() for p in params]
        with torch.no_grad():
            for p in params:
                p.add_(p.grad * (rho / (norm + 1e-12)))
        closure()
        with torch.no_grad():
            for p, old in zip(params, kept):
                p.copy_(old)
        if step % interval == 0:
            rescale(model, optimizer)
        optimizer.step()
    return model


@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize("step", [step_with_closure, two_steps])
@pytest.mark.parametrize("form", [SAM, SAMOfDifferences])
def test_sam_trains_as_by_hand(form, step, interval):
    start = adapted(Net(), scaling_interval=interval, accumulator_rank=5)
    with automatic_rescaling(False):
        expected = sam_by_hand(start, 8, interval)
    model = copy.deepcopy(start)
    optimizer = form(trainable(model), torch.optim.AdamW, lr=1e-2)
    for _ in range(8):
        step(model, optimizer)
    assert rescalings(model) == [8 // interval] * 3
    assert last_report(optimizer) is last_report(optimizer.base_optimizer) is not None
    for ours, theirs in zip(layers_of(model), layers_of(expected)):
        torch.testing.assert_close(torch.tensor(change(ours)), torch.tensor(change(theirs)), rtol=1e-3, atol=1e-5)


def test_a_closure_that_is_called_twice_in_a_step_counts_once_at_the_weights_of_the_step():
    """Rescaling between w and w + e(w) folds e(w) with them; the change of the weights would jump."""
    model = adapted(Net(), scaling_interval=1)
    optimizer = SAMOfOneClass(trainable(model), lr=0.0, weight_decay=0.0)
    for layer in layers_of(model):
        torch.nn.init.normal_(layer.factors("default")[0], std=0.1)
    before = [change(layer) for layer in layers_of(model)]
    for _ in range(4):
        step_with_closure(model, optimizer)
    assert [layer.progress("default").steps for layer in layers_of(model)] == [4, 4, 4]
    assert rescalings(model) == [4, 4, 4]
    for layer, was in zip(layers_of(model), before):
        assert abs(change(layer) - was).max() < 1e-5 * abs(was).max()


@pytest.mark.parametrize(
    "wrapper, names",
    [
        (Lookahead, "under Lookahead, which keeps 'slow_buffer': copies of the factors"),
        (LookaheadWithAList, "under LookaheadWithAList, which keeps 'slow_weights': copies of the factors"),
        (LookaheadInTheGroups, "which keeps 'slow': copies of the factors"),
        (LookaheadInTheInnerState, "cannot carry the state 'lookahead_slow_buff' of optimizer AdamW"),
        (ScheduleFree, "under ScheduleFree, which keeps 'z': copies of the factors"),
    ],
)
@pytest.mark.parametrize("interval", [1, 4])
def test_copies_of_the_factors_are_refused_before_anything_is_rescaled(wrapper, names, interval):
    model = adapted(Net(), scaling_interval=interval)
    optimizer = wrapper(torch.optim.AdamW(trainable(model), lr=1e-2))
    closure = closure_of(model, optimizer)
    with pytest.raises(TypeError, match=names):
        for _ in range(interval + 2):
            closure()
            optimizer.step()
    if wrapper is not LookaheadInTheInnerState:  # which has no copies before its second step
        assert rescalings(model) == [0, 0, 0]
    with automatic_rescaling(False):  # as plain LoRA it trains
        for _ in range(4):
            closure()
            optimizer.step()


@pytest.mark.parametrize("wrap", [Plain, lambda o: Plain(Plain(o)), lambda o: Several([o])])
@pytest.mark.parametrize("with_closure", [True, False])
@pytest.mark.parametrize("inner", [torch.optim.AdamW, with_rescaling(torch.optim.AdamW)])
def test_a_wrapper_that_keeps_nothing_changes_nothing(wrap, with_closure, inner):
    start, results = adapted(Net(), scaling_interval=2), []
    for wrapper in (lambda optimizer: optimizer, wrap):
        model = copy.deepcopy(start)
        optimizer = wrapper(inner(trainable(model), lr=1e-2))
        for _ in range(5):
            if with_closure:
                step_with_closure(model, optimizer)
            else:
                closure_of(model, optimizer)()
                optimizer.step()
        assert rescalings(model) == [2, 2, 2]
        assert last_report(optimizer).layers == 3
        results.append(snapshot(model))
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


@pytest.mark.parametrize("wrap", [lambda o: SAM(o, torch.optim.AdamW, lr=1e-2), lambda o: Plain(torch.optim.AdamW(o))])
def test_a_call_with_a_wrapper_carries_the_moments_of_what_it_holds(wrap):
    model = adapted(Net())
    optimizer = wrap(trainable(model))
    inner = next(value for value in vars(optimizer).values() if isinstance(value, torch.optim.Optimizer))
    for _ in range(2):
        step_with_closure(model, optimizer)
    closure_of(model, optimizer)()
    p = layers_of(model)[0].factors("default")[1]
    before = inner.state[p]["exp_avg"].clone()
    assert rescale(model, optimizer).layers == 3
    assert not torch.equal(inner.state[p]["exp_avg"], before)


def test_optimizers_in_a_list_are_rescaled_with_their_own_moments():
    model = adapted(Net(), scaling_interval=2)
    first, *others = layers_of(model)
    one = torch.optim.SGD(first.factors("default"), lr=1e-3, momentum=0.9)
    two = torch.optim.AdamW([p for layer in others for p in layer.factors("default")], lr=1e-3)
    optimizer = Several([one, two])
    for _ in range(4):
        step_with_closure(model, optimizer)
    assert rescalings(model) == [2, 2, 2]
    assert last_report(one).layers == 1 and last_report(two).layers == 2
    closure_of(model, optimizer)()
    assert rescale(model, optimizer).layers == 3
