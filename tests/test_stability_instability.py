"""The playbook's rules on losses whose instability is known."""

import json
import os

import numpy as np
import pytest

from peft_scalora.stability import LossMonitor, detect_instability

STEPS = 300


def healthy(noise=0.05, seed=0, steps=STEPS):
    t = np.arange(steps)
    return (0.5 + 2 * np.exp(-t / (steps / 8))) * (1 + noise * np.random.default_rng(seed).standard_normal(steps))


def bump(start, length, height):
    loss = healthy()
    loss[start : start + length] += height
    return loss


def test_a_spike_is_found_where_it_is():
    report = detect_instability(bump(150, 12, 3.0))
    (event,) = report.events
    assert event.kind == "spike"
    assert event.start == 151  # steps count from 1
    assert 160 <= event.end <= 168
    assert event.height == pytest.approx(3.0, abs=0.3)
    assert report.unstable and not report.diverged and not report.early
    assert "gradient clipping comes first" in report.advice


def test_every_spike_is_an_event_of_its_own():
    loss = bump(100, 10, 3.0) + bump(200, 10, 3.0) - healthy()
    assert [(e.kind, e.start) for e in detect_instability(loss).events] == [("spike", 101), ("spike", 201)]


@pytest.mark.parametrize("start", [3, 6, 15])
def test_early_blow_up(start):
    loss = healthy()
    loss[start:] = 2.5 + 0.5 * np.arange(STEPS - start)
    report = detect_instability(loss)
    assert report.diverged and report.early
    assert report.events[0].start <= start + 10
    assert "warmup comes first" in report.advice


def test_early_rise_that_recovers():
    """Sparse evaluation misses this one."""
    loss = healthy(steps=STEPS)
    loss[8:28] += np.linspace(0.0, 6.0, 20)
    report = detect_instability(loss)
    assert [event.kind for event in report.events] == ["spike"]
    assert report.early and not report.diverged


def test_slow_divergence():
    loss = healthy()
    loss[200:] += np.linspace(0.0, 2.0, 100)
    report = detect_instability(loss)
    (event,) = report.events
    assert event.kind == "divergence"
    assert 201 <= event.start <= 245
    assert event.end == STEPS
    assert report.diverged and not report.early


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_losses_that_are_not_finite(value):
    loss = healthy()
    loss[120:123] = value
    (event,) = detect_instability(loss).events
    assert (event.kind, event.start, event.end) == ("non-finite", 121, 123)
    assert detect_instability(loss).diverged
    assert detect_instability([value]).diverged


@pytest.mark.parametrize("noise", [0.0, 0.01, 0.2])
def test_a_plateau_is_not_unstable(noise):
    loss = np.full(STEPS, 2.3) * (1 + noise * np.random.default_rng(1).standard_normal(STEPS))
    assert not detect_instability(loss).unstable


@pytest.mark.parametrize("noise", [0.0, 0.05, 0.2])
@pytest.mark.parametrize("steps", [12, 60, 1000])
def test_no_alarm_on_noise_around_a_falling_loss(noise, steps):
    for seed in range(20):
        assert not detect_instability(healthy(noise, seed, steps)).unstable


def test_no_alarm_on_single_outliers():
    for seed in range(10):
        loss = healthy(0.05, seed)
        loss[np.random.default_rng(seed).choice(STEPS, 5, replace=False)] *= 4
        assert not detect_instability(loss).unstable


def test_no_alarm_on_recorded_healthy_runs():
    """Made by eval/studies/healthy_runs.py: real models, several learning rates and batch sizes."""
    with open(os.path.join(os.path.dirname(__file__), "healthy_runs.json"), encoding="utf-8") as file:
        runs = json.load(file)["runs"]
    assert len(runs) == 20
    alarms = [run["name"] for run in runs if detect_instability(run["losses"]).unstable]
    assert alarms == []
    # The same runs with a blow-up put in are all found out.
    for run in runs:
        losses = np.array(run["losses"])
        losses[len(losses) // 2 :] += 2 * losses[0]
        assert detect_instability(losses).diverged, run["name"]


def test_the_scale_of_the_loss_does_not_matter():
    loss = bump(150, 12, 3.0)
    first, second = detect_instability(loss), detect_instability(1e-4 * loss)
    assert [(e.kind, e.start, e.end) for e in first.events] == [(e.kind, e.start, e.end) for e in second.events]


def test_a_monitor_says_it_when_it_begins():
    monitor, seen = LossMonitor(), []
    for step, loss in enumerate(bump(150, 12, 3.0), 1):
        event = monitor.update(float(loss), step)
        if event is not None:
            seen.append(step)
    assert len(seen) == 1 and 151 <= seen[0] <= 155


def trainer_state(folder, losses, every=1):
    os.makedirs(folder)
    log = [{"step": every * (i + 1), "loss": float(loss)} for i, loss in enumerate(losses)]
    log += [{"step": len(losses), "eval_loss": 1e9}]
    with open(folder / "trainer_state.json", "w") as file:
        json.dump({"log_history": log, "global_step": int(folder.name.rpartition("-")[2])}, file)


def test_logged_runs_are_read(tmp_path):
    trainer_state(tmp_path / "checkpoint-300", bump(150, 12, 3.0), every=10)
    trainer_state(tmp_path / "checkpoint-20", healthy()[:20])
    (tmp_path / "checkpoint-400").mkdir()  # of a run that was killed while it saved
    for source in (tmp_path, str(tmp_path / "checkpoint-300"), tmp_path / "checkpoint-300" / "trainer_state.json"):
        (event,) = detect_instability(source).events
        assert (event.kind, event.start) == ("spike", 1510)


def test_sources_without_losses_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no trainer_state\.json"):
        detect_instability(tmp_path)
    (tmp_path / "trainer_state.json").write_text('{"log_history": [{"eval_loss": 1.0, "step": 1}]}')
    with pytest.raises(ValueError, match="holds no training loss"):
        detect_instability(tmp_path)
    with pytest.raises(ValueError, match="losses is empty"):
        detect_instability([])


def test_an_early_spike_that_outweighs_the_noise_around_it():
    """A fine-tuning at a learning rate that is too high: quiet while the head is zero, then up, then back."""
    rng = np.random.default_rng(0)
    loss = np.concatenate([np.full(4, 0.69), np.exp(rng.normal(1.5, 1.0, 12)), 0.65 + 0.1 * rng.standard_normal(40)])
    report = detect_instability(loss)
    assert [event.kind for event in report.events] == ["spike"]
    assert report.early
    quiet = np.concatenate([np.full(4, 0.69), 0.65 + 0.1 * rng.standard_normal(40)])
    assert not detect_instability(quiet).unstable


def test_a_run_that_stays_above_its_start_is_unstable_however_noisy():
    """Recorded: ScaLoRA on MiniLM at a learning rate of 0.1."""
    loss = (
        "0.7 0.69 0.73 0.68 1.36 0.76 14.12 2.71 4.44 7.26 1.05 13.75 13.0 9.9 1.79 4.28 7.96 3.13 4.25 4.03 1.17 6.85"
    )
    loss += " 7.64 5.39 1.09 6.43 7.41 5.35 6.52 3.16 1.13 5.43 4.41 1.22 2.32 0.98 2.1 3.17 3.38 3.57"
    report = detect_instability([float(x) for x in loss.split()])
    assert report.early
    assert report.events[0].start <= 12


def blown_up(step, seed, steps=40):
    """0.69 for `step` losses, then about 40."""
    rng = np.random.default_rng([step, seed])
    return np.concatenate([np.full(step, 0.69), 40 * np.exp(0.5 * rng.standard_normal(steps - step))])


@pytest.mark.parametrize("step", [1, 2, 3, 4, 5, 6, 10, 20, 30])
def test_an_explosion_does_not_set_its_own_limit(step):
    for seed in range(50):
        report = detect_instability(blown_up(step, seed))
        assert report.verdict == "unstable" and report.diverged
        assert report.events[0].start == step + 1


@pytest.mark.parametrize(
    "begin",
    [
        [0.69, 0.68, 6.91, 50.0, 184.0],  # recorded: a sweep at learning rate 1
        [0.69, 1.02, 12.0, 57.0],  # recorded: warmup to the peak 1
    ],
)
def test_recorded_early_explosions(begin):
    losses = [*begin, *np.geomspace(begin[-1], 24.0, 36)]
    report = detect_instability(losses)
    assert [(event.kind, event.start, event.end) for event in report.events] == [("divergence", 3, len(losses))]


def test_an_early_explosion_that_comes_half_way_down_is_unstable():
    """Recorded: a tiny classifier at learning rate 1, twelve steps with decay."""
    losses = [0.6938, 0.6921, 2.814, 7.664, 4.672, 2.056, 1.289, 2.04, 2.486, 2.931, 1.287, 1.627]
    (event,) = detect_instability(losses).events
    assert (event.kind, event.start) == ("divergence", 3)


def test_an_early_explosion_that_comes_back_is_a_spike():
    losses = [0.69, 0.68, 7.0, 50.0, 90.0, 40.0, 12.0, *np.linspace(0.7, 0.4, 40)]
    assert [(e.kind, e.start, e.end) for e in detect_instability(losses).events] == [("spike", 3, 7)]


@pytest.mark.parametrize(("height", "length"), [(0.1, 40), (0.2, 20), (0.3, 10)])
def test_no_alarm_on_an_early_rise_while_the_learning_rate_warms_up(height, length):
    t = np.arange(150)
    rise = np.where(t < length, height * np.sin(np.pi * t / length), 0.0)
    for seed in range(20):
        noise = 1 + 0.03 * np.random.default_rng(seed).standard_normal(150)
        assert not detect_instability(
            2 * (0.5 + 0.5 * np.exp(-np.maximum(0, t - length / 2) / 40) + rise) * noise
        ).events


@pytest.mark.parametrize("count", [1, 5, 9])
def test_few_losses_are_too_short_to_tell(count):
    losses = healthy(0.01)[:count]
    report = detect_instability(losses)
    assert report.verdict == "too short to tell" and not report.unstable
    assert report.advice == f"{count} losses are too short to tell: log at least 10 (logging_steps=1)."
    assert detect_instability(healthy(0.01)[:10]).verdict == "stable"
    assert detect_instability([*losses, float("nan")]).verdict == "unstable"
    assert detect_instability([*losses[:1], 40.0, 50.0, 45.0, 60.0]).verdict == "unstable"


def test_a_loss_of_exactly_0():
    assert detect_instability([0.0] * 50).verdict == "stable"
    falls = np.maximum(0.0, healthy(0.05) - 0.6)
    assert falls[-1] == 0.0 and detect_instability(falls).verdict == "stable"
    assert detect_instability([*falls, *[1.0] * 10]).diverged


def test_oscillation_counts_where_it_passes_what_the_run_began_with():
    t = np.arange(STEPS)
    growing = np.abs(healthy() + 0.2 * np.maximum(0, t - 100) * np.cos(2 * np.pi * t / 7))
    assert detect_instability(growing).unstable
    assert detect_instability(healthy() + 0.1 * np.cos(2 * np.pi * t / 7)).verdict == "stable"


def test_the_limit_is_what_the_rule_says():
    """Transcribed for a run without noise, which falls: what few losses leave open decides, then progress."""
    losses = np.linspace(2.0, 1.0, 200)
    monitor, limits = LossMonitor(), []
    for loss in losses:
        monitor.update(float(loss))
        limits.append(monitor.limit)
    assert limits[:4] == [None] * 4
    step = 1 / 199
    for count in (16, 100, 200):
        window = losses[: count - 1][-20:]
        best, start = np.median(window), np.median(losses[:5])
        spread = max(0.05 * (start - best), best * (4 ** (1 / np.sqrt(count)) - 1), 5 * 1.4826 / np.sqrt(2) * step)
        assert limits[count - 1] == pytest.approx(best + spread)
    for count in (5, 9):  # the noise is not known
        assert limits[count - 1] == pytest.approx(
            1.25 * min(np.median(losses[:s]) * 4 ** (1 / s**0.5) for s in (1, 3, 5))
        )


def test_a_cut_off_or_continued_run_has_the_events_of_the_whole():
    """Limits look back only: what comes later does not change what was found."""
    losses = bump(100, 10, 3.0)
    whole = detect_instability(losses).events
    assert [(e.start, e.end) for e in detect_instability(losses[:200]).events] == [(e.start, e.end) for e in whole]
