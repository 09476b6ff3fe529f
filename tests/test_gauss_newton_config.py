"""Settings of Gauss-Newton training: what is refused, and the study's."""

import pytest

from peft_scalora import GaussNewtonConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"variant": "newton"}, "variant='newton' must be one of 'gn', 'prox_linear'"),
        ({"inner_optimizer": "sgd"}, "inner_optimizer='sgd' must be one of"),
        ({"inner_schedule": "linear"}, "inner_schedule='linear' must be one of"),
        ({"inner_steps": 0}, "inner_steps=0 must be a whole number, 1 or more"),
        ({"line_search_points": 2.5}, "line_search_points=2.5 must be a whole number"),
        ({"anchor_l2": -1.0}, "anchor_l2=-1.0 must be a number, 0 or more"),
        ({"damping": float("inf")}, "damping=inf must be a number"),
        ({"inner_optimizer": "cg", "variant": "prox_linear"}, "inner_optimizer='cg' solves the quadratic model"),
        ({"inner_optimizer": "cg", "layerwise": True}, "inner_optimizer='cg' solves the quadratic model"),
    ],
)
def test_config_names_the_field_and_the_value(settings, message):
    with pytest.raises(ValueError, match=message):
        GaussNewtonConfig(**settings)


def test_the_studys_settings():
    config, arguments = GaussNewtonConfig.study("45m", variant="prox_linear")
    assert (config.inner_steps, config.line_search_points, config.variant) == (122, 5, "prox_linear")
    assert arguments["learning_rate"] == 1e-2 and arguments["per_device_train_batch_size"] == 32
    config, arguments = GaussNewtonConfig.study("150m")
    assert (config.inner_steps, config.line_search_points, config.anchor_l2) == (1831, 10, 0.01)
    assert arguments["learning_rate"] == 3e-3 and arguments["per_device_train_batch_size"] == 128
    with pytest.raises(ValueError, match="size='7b' must be one of '45m', '150m'"):
        GaussNewtonConfig.study("7b")
