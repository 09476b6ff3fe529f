"""Gradient norms, the percentile threshold and clipping, against NumPy."""

import numpy as np
import pytest
import torch
from torch import nn

from peft_scalora.stability import StabilityConfig, StabilityMonitor
from peft_scalora.stability.gradients import gradient_norms, layer_group, percentile


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.layers = nn.ModuleList([nn.Linear(3, 3) for _ in range(2)])
        self.head = nn.Linear(3, 2)


def with_gradients(seed, scale=1.0, dtype=torch.float32):
    model, rng = Model().to(dtype), np.random.default_rng(seed)
    for parameter in model.parameters():
        parameter.grad = torch.tensor(scale * rng.standard_normal(parameter.shape), dtype=dtype)
    return model


def numpy_norm(model, prefix=""):
    grads = [p.grad.double().numpy().ravel() for name, p in model.named_parameters() if name.startswith(prefix)]
    return np.linalg.norm(np.concatenate(grads))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_norms_equal_numpy(dtype):
    model = with_gradients(0, 50.0, dtype)
    norm, groups = gradient_norms(model.named_parameters())
    assert norm == pytest.approx(numpy_norm(model), rel=1e-6)
    assert groups == {name: pytest.approx(numpy_norm(model, name), rel=1e-6) for name in groups}
    assert list(groups) == ["embed", "layers.0", "layers.1", "head"]


def test_parameters_without_gradient_are_left_out():
    model = with_gradients(0)
    model.head.weight.grad = model.head.bias.grad = None
    norm, groups = gradient_norms(model.named_parameters())
    assert "head" not in groups
    assert norm == pytest.approx(np.sqrt(sum(x**2 for x in groups.values())))
    model.zero_grad()
    assert np.isnan(gradient_norms(model.named_parameters())[0])


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("transformer.h.3.attn.c_attn.weight", "transformer.h.3"),
        ("base_model.model.model.layers.11.self_attn.q_proj.lora_A.default.weight", "model.layers.11"),
        ("module.lm_head.weight", "lm_head"),
        ("weight", "weight"),
    ],
)
def test_layer_groups(name, group):
    assert layer_group(name) == group


@pytest.mark.parametrize("q", [0.5, 10, 50, 90, 99.9, 100])
@pytest.mark.parametrize("count", [1, 2, 7, 100])
def test_percentile_equals_numpy(q, count):
    values = np.sort(np.random.default_rng(count).lognormal(size=count))
    assert percentile(values, q) == pytest.approx(np.percentile(values, q), rel=1e-12)


def test_clipping_equals_a_numpy_transcription():
    """60 steps: threshold, clipped gradients and share of clipped steps."""
    monitor = StabilityMonitor(StabilityConfig(percentile=80, burn_in=10, plot=False), max_norm=3.0)
    norms, clipped = [], []
    for step in range(60):
        model = with_gradients(step, scale=np.random.default_rng([step, 1]).lognormal())
        before = {name: p.grad.double().numpy() for name, p in model.named_parameters()}
        norm = numpy_norm(model)
        threshold = 3.0 if step < 10 else np.percentile(norms, 80)
        factor = threshold / norm if norm > threshold else 1.0
        norms.append(norm)
        clipped.append(bool(norm > threshold))
        assert monitor.clip(model) == pytest.approx(norm, rel=1e-6)
        assert monitor.thresholds[-1] == pytest.approx(threshold, rel=1e-6)
        for name, p in model.named_parameters():
            np.testing.assert_allclose(p.grad.numpy(), factor * before[name], rtol=2e-6)
    assert monitor.clipped == clipped
    assert any(clipped[10:]) and not all(clipped[10:])
    assert monitor.clipped_share == sum(clipped[10:]) / 50
    assert monitor.steps == list(range(1, 61))


def test_norms_that_are_not_finite_are_recorded_but_never_set_the_threshold():
    monitor = StabilityMonitor(StabilityConfig(percentile=100, burn_in=2, plot=False))
    for scale in (1.0, float("inf"), 2.0, float("nan"), 10.0):
        model = with_gradients(0)
        for parameter in model.parameters():
            parameter.grad.mul_(scale)
        monitor.clip(model)
    unit = numpy_norm(with_gradients(0))
    assert monitor.thresholds[:3] == [None, None, None]
    assert monitor.thresholds[3:] == [pytest.approx(2 * unit), pytest.approx(2 * unit)]
    assert monitor.clipped == [False, False, False, False, True]


def test_calibration_gives_a_constant_threshold(tmp_path):
    first = StabilityMonitor(StabilityConfig(plot=False))
    for step in range(30):
        first.clip(with_gradients(step))
    first.save(tmp_path)
    for calibration in (first.norms, str(tmp_path / "stability.json")):
        second = StabilityMonitor(StabilityConfig(calibration=calibration, plot=False))
        for step in range(3):
            second.clip(with_gradients(step, 4.0))
        assert second.thresholds == [pytest.approx(np.percentile(first.norms, 90))] * 3
        assert second.clipped == [True] * 3


def test_calibration_leaves_out_what_is_no_update():
    """As the running percentile does: steps of a line search have a norm of 0."""
    monitor = StabilityMonitor(StabilityConfig(percentile=50, calibration=[0, 3, 0, 5, 0, float("inf")], plot=False))
    monitor.clip(with_gradients(0))
    assert monitor.thresholds == [np.median([3, 5])]
    with pytest.raises(ValueError, match="no finite gradient norm above 0"):
        StabilityMonitor(StabilityConfig(calibration=[0.0, 0.0], plot=False))


def test_advice_past_half_of_the_updates():
    monitor = StabilityMonitor(StabilityConfig(calibration=[1.0], plot=False))
    for step in range(20):
        assert monitor.advice is None
        monitor.clip(with_gradients(step, 10.0 if step % 2 else 1e-3))
    assert monitor.advice is None  # exactly half
    monitor.clip(with_gradients(20, 10.0))
    assert "11 of 21 updates were clipped, more than half: lower the learning rate" in monitor.advice


def test_state_continues_exactly():
    def run(monitor, steps):
        for step in steps:
            monitor.clip(with_gradients(step, 1 + step % 5))
            monitor.add_loss(1 / (1 + step))

    config = StabilityConfig(burn_in=8, plot=False)
    whole, first, second = (StabilityMonitor(config, 2.0) for _ in range(3))
    run(whole, range(30))
    run(first, range(13))
    second.load_state_dict(first.state_dict())
    run(second, range(13, 30))
    assert second.state_dict() == whole.state_dict()
    assert second.clipped_share == whole.clipped_share > 0
    assert second.report() == whole.report()


def test_loss_scaling_is_undone_before_the_norm():
    """float16 with torch's gradient scaler: the recorded norm is that of the true gradient."""
    torch.manual_seed(0)
    model, x = nn.Linear(4, 3), torch.randn(5, 4)
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(model(x).square().mean()).backward()
    scaler.unscale_(optimizer)
    monitor = StabilityMonitor(StabilityConfig(calibration=[0.01], plot=False))
    recorded = monitor.clip(model)
    after = gradient_norms(model.named_parameters())[0]
    model.zero_grad()
    model(x).square().mean().backward()
    assert recorded == pytest.approx(numpy_norm(model), rel=1e-5)
    assert after == pytest.approx(0.01, rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"percentile": 0}, "percentile=0 must be above 0"),
        ({"percentile": 101}, "percentile=101"),
        ({"burn_in": 0}, "burn_in=0 must be at least 1"),
        ({"percentile": None, "calibration": [1.0]}, "calibration is given with percentile=None"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, match):
    with pytest.raises(ValueError, match=match):
        StabilityConfig(**settings, plot=False)


def test_calibration_files_of_other_kinds_are_refused(tmp_path):
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match=r"other\.json' holds no norms"):
        StabilityMonitor(StabilityConfig(calibration=str(tmp_path / "other.json"), plot=False))
    with pytest.raises(ValueError, match="no finite gradient norm above 0"):
        StabilityMonitor(StabilityConfig(calibration=[float("nan")], plot=False))
