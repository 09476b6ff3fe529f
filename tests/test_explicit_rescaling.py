"""The off switch of automatic rescaling, and optimizer classes that rescale by themselves."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from helpers_rescale import Net, X, Y, adapted, layers_of, snapshot, train, trainable

from peft_scalora import automatic_rescaling, last_report, rescale, with_rescaling

AdamW = with_rescaling(torch.optim.AdamW)


class AdamWOfMine(torch.optim.AdamW):
    def step(self, closure=None):
        return super().step(closure)


def counts(model):
    return [(layer.progress("default").steps, layer.progress("default").rescalings) for layer in layers_of(model)]


def test_the_switch_as_a_call_and_as_a_context():
    model = adapted(Net(), scaling_interval=1)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-3)
    with automatic_rescaling(False):
        train(model, optimizer, 2)
        with automatic_rescaling(True):
            train(model, optimizer, 1)
        train(model, optimizer, 2)
    assert counts(model) == [(1, 1)] * 3
    automatic_rescaling(False)
    try:
        train(model, optimizer, 2)
        assert counts(model) == [(1, 1)] * 3
    finally:
        automatic_rescaling(True)
    train(model, optimizer, 1)
    assert counts(model) == [(2, 2)] * 3
    with pytest.raises(ZeroDivisionError), automatic_rescaling(False):
        raise ZeroDivisionError
    train(model, optimizer, 1)
    assert counts(model) == [(3, 3)] * 3


def test_the_switch_takes_a_bool():
    with pytest.raises(TypeError, match="enabled='off' is not a bool"):
        automatic_rescaling("off")


def test_an_adapter_that_was_trained_with_the_switch_off_warns_when_it_is_saved(tmp_path):
    model = adapted(Net(), scaling_interval=1)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    with automatic_rescaling(False):
        train(model, optimizer, 3)
        with pytest.warns(UserWarning, match="trained but never rescaled"):
            model.save_pretrained(tmp_path)
        rescale(model, optimizer)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*never rescaled")
            model.save_pretrained(tmp_path)


@pytest.mark.parametrize("base", [torch.optim.AdamW, torch.optim.SGD, AdamWOfMine])
@pytest.mark.parametrize("automatic", [True, False])
@pytest.mark.parametrize("with_closure", [True, False])
def test_a_class_with_rescaling_trains_as_the_hook_does(base, automatic, with_closure):
    start, results = adapted(Net(), scaling_interval=2), []
    for cls, switch in ((base, True), (with_rescaling(base), automatic)):
        model = copy.deepcopy(start)
        optimizer = cls(trainable(model), lr=1e-2)

        def closure(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = (model(X) - Y).square().mean()
            loss.backward()
            return loss

        with automatic_rescaling(switch):
            for _ in range(5):
                if with_closure:
                    assert optimizer.step(closure).requires_grad
                else:
                    closure()
                    optimizer.step()
        assert counts(model) == [(5, 2)] * 3
        assert last_report(optimizer).layers == 3
        results.append(snapshot(model))
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


def test_the_class_is_made_once_and_is_a_subclass():
    assert with_rescaling(torch.optim.AdamW) is AdamW is with_rescaling(AdamW)
    assert issubclass(AdamW, torch.optim.AdamW) and AdamW.__name__ == "AdamWWithRescaling"
    with pytest.raises(TypeError, match=r"is no subclass of torch\.optim\.Optimizer. Call peft_scalora\.rescale"):
        with_rescaling(dict)


@pytest.mark.parametrize("base", [torch.optim.AdamW, AdamWOfMine])
def test_classes_and_optimizers_can_be_pickled_and_copied(base):
    cls = with_rescaling(base)
    assert pickle.loads(pickle.dumps(cls)) is cls
    model = adapted(Net(), scaling_interval=2)
    optimizer = cls(trainable(model), lr=1e-3)
    train(model, optimizer, 3)
    file = io.BytesIO()
    torch.save((model, optimizer), file)
    file.seek(0)
    loaded, its_optimizer = torch.load(file, weights_only=False)
    other, others = copy.deepcopy((model, optimizer))
    for each, each_optimizer in ((model, optimizer), (loaded, its_optimizer), (other, others)):
        assert type(each_optimizer) is cls
        train(each, each_optimizer, 1)
        assert counts(each) == [(4, 2)] * 3


def test_schedulers_and_pre_hooks_see_a_step_once():
    model = adapted(Net(), scaling_interval=2)
    torch.optim.AdamW(trainable(model))  # from here on the base class runs hooks
    optimizer, seen = AdamW(trainable(model), lr=1e-3), []
    optimizer.register_step_pre_hook(lambda *args: seen.append("before"))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    for _ in range(4):
        train(model, optimizer, 1)
        scheduler.step()
    assert seen == ["before"] * 4 and counts(model) == [(4, 2)] * 3
