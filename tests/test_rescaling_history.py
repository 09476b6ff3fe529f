"""Factors that are put back under the change accumulated since are noticed; what trainings do otherwise is not."""

import copy
import warnings

import pytest
import torch
from helpers_models import KINDS, distance, output, train
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch.optim.swa_utils import AveragedModel

from peft_scalora.rescaling.history import STEPS

every_name = pytest.mark.parametrize("name", ["Linear", "Embedding", "Conv2d", "MultiheadAttention", "BERT"])
PUT_BACK = "factors of adapter 'default' are those of an earlier step"


def trained(name="Linear", **kwargs):
    kind = KINDS[name]
    _, model = kind.filled(**kwargs)
    model.train()
    optimizer = train(model, kind.inputs(), 2)
    return model, optimizer, kind.inputs()


def copies(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def by_copy(parameter, value):
    with torch.no_grad():
        parameter.copy_(value)


def past_autograd(parameter, value):
    parameter.data.copy_(value)


def by_assignment(parameter, value):
    parameter.data = value.clone()


def put_back(model, best, how=by_copy):
    for name, parameter in model.named_parameters():
        if name in best:
            how(parameter, best[name])


@every_name
@pytest.mark.parametrize("how", [by_copy, past_autograd, by_assignment], ids=lambda how: how.__name__)
@pytest.mark.parametrize("then", ["save", "train"])
def test_factors_of_an_earlier_time_are_reported(tmp_path, name, how, then):
    model, optimizer, x = trained(name)
    best = copies(model)
    train(model, x, 3, optimizer)
    put_back(model, best, how)
    with pytest.warns(UserWarning, match=PUT_BACK):
        if then == "save":
            model.save_pretrained(tmp_path)
        else:
            train(model, x, 1, optimizer)


@pytest.fixture
def no_report():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=f".*{PUT_BACK}")
        yield


def test_an_adapter_put_back_whole_is_not_reported(no_report, tmp_path):
    model, optimizer, x = trained()
    best = copy.deepcopy(get_peft_model_state_dict(model))
    expected = output(model, x)
    train(model, x, 3, optimizer)
    set_peft_model_state_dict(model, best)
    assert distance(output(model, x), expected) < 1e-6
    model.save_pretrained(tmp_path)
    train(model, x, 3, optimizer)
    model.save_pretrained(tmp_path)


def test_factors_put_back_before_the_next_rescaling_are_not_reported(no_report, tmp_path):
    """They belong to the accumulated change that is still there."""
    model, optimizer, x = trained(scaling_interval=1)
    for config in (layer.scalora_config["default"] for layer in model.modules() if hasattr(layer, "scalora_config")):
        config.scaling_interval = 100
    best = copies(model)
    train(model, x, 3, optimizer)
    put_back(model, best)
    model.save_pretrained(tmp_path)
    train(model, x, 3, optimizer)


def test_weights_averaged_or_swapped_for_a_while_are_not_reported(no_report, tmp_path):
    model, optimizer, x = trained()
    averaged = AveragedModel(model)
    for _ in range(3):
        train(model, x, 1, optimizer)
        averaged.update_parameters(model)
        own = copies(model)
        means = {n.removeprefix("module."): p.detach() for n, p in averaged.named_parameters()}
        put_back(model, {n: value for n, value in means.items() if n in own})
        output(model, x)
        put_back(model, own)
    put_back(model, {name: 0.5 * value for name, value in own.items()})
    train(model, x, 1, optimizer)
    model.save_pretrained(tmp_path)


def test_steps_that_move_nothing_are_not_reported(no_report, tmp_path):
    """With a learning rate of 0, rescalings count on while the factors of skipped layers stay."""
    model, *_ = trained()
    still = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    for _ in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        still.step()
    model.save_pretrained(tmp_path)


def test_a_long_training_remembers_its_latest_steps():
    model, optimizer, x = trained(target_modules=["lin0"])
    train(model, x, STEPS // 64, optimizer)
    best = copies(model)
    train(model, x, 3, optimizer)
    put_back(model, best)
    with pytest.warns(UserWarning, match=PUT_BACK):
        train(model, x, 1, optimizer)
