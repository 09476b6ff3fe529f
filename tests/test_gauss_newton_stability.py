"""Gauss-Newton and the stability callback in one Trainer."""

import numpy as np
import pytest
import torch
from helpers_gauss_newton import make_trainer, trainable

from peft_scalora import StabilityCallback, StabilityConfig

CLIP = 0.5  # below most norms of these runs


def together(folder, config, stability, first, **arguments):
    """A Trainer with both callbacks, the stability one before or after Gauss-Newton's."""
    trainer = make_trainer(folder, config, **arguments)
    callback = StabilityCallback(StabilityConfig(plot=False, **stability))
    trainer.add_callback(callback)
    if first:
        callbacks = trainer.callback_handler.callbacks
        callbacks.insert(0, callbacks.pop())
    return trainer, callback


@pytest.mark.parametrize("first", [False, True])
def test_a_fixed_threshold_is_trainers_own_clipping(tmp_path, first):
    plain = make_trainer(tmp_path / "plain", max_grad_norm=CLIP)
    plain.train()
    trainer, callback = together(tmp_path / "both", {}, {"percentile": None}, first, max_grad_norm=CLIP)
    trainer.train()
    assert sum(callback.monitor.clipped) > 3
    left, right = trainable(plain.model), trainable(trainer.model)
    for name, p in left.items():
        torch.testing.assert_close(right[name], p, rtol=1e-5, atol=1e-6)


def test_the_percentile_is_of_inner_steps_alone(tmp_path):
    trainer, callback = together(tmp_path, {}, {"percentile": 50.0, "burn_in": 4}, False, max_grad_norm=100.0)
    trainer.train()
    norms, thresholds = callback.monitor.norms, callback.monitor.thresholds
    searches = [i for i, norm in enumerate(norms) if norm == 0]
    assert searches == [4, 9, 14]  # every fifth step is a line search
    inner = [norm for norm in norms[:14] if norm > 0]
    assert thresholds[14] == pytest.approx(np.percentile(inner, 50.0))
    assert thresholds[14] != pytest.approx(np.percentile(norms[:14], 50.0))
    judged = [norms[i] > thresholds[i] for i in range(5, 15) if norms[i] > 0]
    assert callback.monitor.clipped_share == pytest.approx(np.mean(judged))


@pytest.mark.parametrize("first", [False, True])
def test_conjugate_gradients_are_never_clipped(tmp_path, first):
    config = {"inner_optimizer": "cg", "inner_steps": 1}
    trainer, _ = together(tmp_path, config, {}, first, max_grad_norm=0.0)
    before = trainable(trainer.model)
    with pytest.raises(ValueError, match="inner_optimizer='cg' solves for the unclipped"):
        trainer.train()
    assert all(torch.equal(p, before[name]) for name, p in trainable(trainer.model).items())
