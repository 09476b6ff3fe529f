"""Sweep and warmup search on problems whose answer is known, sharing and resuming their study."""

import copy
import gc
import json
import math
import random
import signal
import sqlite3
import subprocess
import sys
import time
import warnings
import weakref
from contextlib import closing

import numpy as np
import optuna
import pytest
import torch
from helpers_runs import language_model
from helpers_stability import make_trainer
from sqlalchemy import event
from transformers import set_seed
from transformers.utils import logging as transformers_logging

from peft_scalora.stability import prepend_warmup, search_warmup, study, sweep_learning_rate
from peft_scalora.stability.learning_rate import learning_rate_grid
from peft_scalora.stability.runs import Run, final_loss
from peft_scalora.stability.study import Point, Study, sqlite_storage


def quadratic(learning_rate, steps=40, curvatures=(1.0, 10.0), warmup=0):
    """Gradient descent on ½ Σ c x²: factors 1 - lr c a step, so stable below 2/10 for these curvatures."""
    c, x, losses = np.array(curvatures), np.ones(len(curvatures)), []
    for step in range(steps):
        losses.append(float(0.5 * (c * x**2).sum()))
        x = x - learning_rate * min(1.0, step / warmup if warmup else 1.0) * c * x
    return losses


def test_the_grid_is_nested_and_log_spaced():
    grid = learning_rate_grid(1e-4, 1e-1, 2)
    assert grid == pytest.approx([1e-4, 10**-3.5, 1e-3, 10**-2.5, 1e-2, 10**-1.5, 1e-1])
    assert all(any(math.isclose(a, b) for b in learning_rate_grid(1e-4, 1e-1, 6)) for a in grid)
    with pytest.raises(ValueError, match=r"low=0\.1 and high=0\.01"):
        learning_rate_grid(0.1, 0.01, 2)
    with pytest.raises(ValueError, match="give 1 points"):
        learning_rate_grid(1e-3, 1.1e-3, 1)


def test_best_and_unstable_rates_of_a_quadratic(tmp_path):
    sweep = sweep_learning_rate(quadratic, 1e-2, 1.0, 6, output=tmp_path, check_steps=0)
    rates = learning_rate_grid(1e-2, 1.0, 6)
    assert sweep.learning_rates == rates
    assert sweep.scores == [final_loss(quadratic(rate)) for rate in rates]
    assert sweep.best_learning_rate == min(rates, key=lambda rate: max(abs(1 - rate), abs(1 - 10 * rate)))
    assert sweep.unstable_base_learning_rate == next(rate for rate in rates if rate > 0.2)
    saved = json.loads((tmp_path / "sweep.json").read_text())
    assert saved["best_learning_rate"] == sweep.best_learning_rate
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_the_check_at_twice_the_best(tmp_path):
    tried = []

    def train(learning_rate):
        tried.append(learning_rate)
        return quadratic(learning_rate)

    sweep = sweep_learning_rate(train, 1e-2, 1.0, 4, output=tmp_path, plot=False)
    assert tried[-1] == 2 * sweep.best_learning_rate
    assert sweep.check_losses == quadratic(tried[-1])
    assert sweep.check.unstable and sweep.advice.startswith("At twice the best learning rate: Unstable early")
    stable = sweep_learning_rate(lambda lr: quadratic(lr / 20), 1e-2, 1.0, 2, output=tmp_path / "b", plot=False)
    assert stable.best_learning_rate == 1.0 and "is at the edge" in stable.advice


def test_runs_of_another_model_are_not_found_by_default(tmp_path, monkeypatch):
    """There is no folder that two sweeps would share without being told to."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TypeError, match="output"):
        sweep_learning_rate(quadratic, 1e-2, 1.0, 1, plot=False)
    with pytest.raises(TypeError, match="output"):
        search_warmup(early_unstable, 1e-3, 1000, plot=False)
    assert not list(tmp_path.iterdir())


def test_diverged_runs_are_never_best(tmp_path):
    def train(learning_rate):
        return [1.0, 0.1, float("nan")] if learning_rate > 0.05 else [1.0, 0.9]

    sweep = sweep_learning_rate(train, 1e-3, 1.0, 1, output=tmp_path, check_steps=0)
    assert sweep.best_learning_rate < 0.05
    assert [math.isinf(score) for score in sweep.scores] == [False, False, True, True]
    assert sweep.unstable_base_learning_rate == pytest.approx(0.1)
    with pytest.raises(ValueError, match="has a finite loss: lower the range"):
        sweep_learning_rate(lambda lr: [float("nan")], 1e-3, 1.0, 1, output=tmp_path / "b", plot=False)


def test_runs_too_short_to_tell_are_not_called_stable(tmp_path):
    def train(learning_rate):
        return quadratic(learning_rate, steps=9, curvatures=(1.0,))

    sweep = sweep_learning_rate(train, 1e-2, 10.0, 2, output=tmp_path, check_steps=0)
    assert sweep.best_learning_rate == pytest.approx(1.0)
    assert sweep.verdicts[0] == "too short to tell" and sweep.verdicts[-1] == "unstable"
    shorter = sweep_learning_rate(lambda lr: train(lr)[:4], 1e-2, 10.0, 2, output=tmp_path / "b", plot=False)
    assert set(shorter.verdicts) == {"too short to tell"} and shorter.unstable_base_learning_rate is None
    assert shorter.check.verdict == "too short to tell" and "4 losses are too short to tell" in shorter.advice
    unchecked = sweep_learning_rate(
        lambda lr: train(lr)[:4], 1e-2, 10.0, 2, output=tmp_path / "b", check_steps=0, plot=False
    )
    assert "Runs of fewer than 10 steps are too short to tell where training blows up" in unchecked.advice


def test_what_to_do_next_is_said(tmp_path):
    def train(learning_rate):  # best at 0.1, and unstable from 1 on
        return quadratic(learning_rate, curvatures=(3.0, 10.0))

    sweep = sweep_learning_rate(train, 1e-2, 1.0, 1, output=tmp_path, check_steps=0, plot=False)
    assert sweep.advice == "Training blows up from 1 on: train at 0.1."


def test_finished_runs_are_not_repeated_and_a_finer_grid_adds_to_them(tmp_path):
    tried = []

    def train(learning_rate):
        if len(tried) == 3 and tried[-1] is not None:
            tried.append(None)
            raise RuntimeError("out of memory")
        tried.append(learning_rate)
        return quadratic(learning_rate)

    with pytest.raises(RuntimeError, match="out of memory"):
        sweep_learning_rate(train, 1e-3, 1.0, 2, output=tmp_path, check_steps=0, plot=False)
    for per_decade, count in ((2, 7), (4, 13)):
        sweep = sweep_learning_rate(train, 1e-3, 1.0, per_decade, output=tmp_path, check_steps=0, plot=False)
        tried = [rate for rate in tried if rate is not None] + [None]
        assert sorted(tried[:-1]) == sweep.learning_rates == learning_rate_grid(1e-3, 1.0, per_decade)
        assert len(tried[:-1]) == count


def test_a_study_of_other_settings_is_refused(tmp_path):
    options = {"output": tmp_path, "check_steps": 0, "plot": False}
    sweep_learning_rate(quadratic, 1e-2, 1e-1, 1, **options, settings={"model": "a"})
    with pytest.raises(ValueError, match=r"with other settings \(model\): choose another"):
        sweep_learning_rate(quadratic, 1e-2, 1e-1, 1, **options, settings={"model": "b"})


WORKER = """
import sys, time
from pathlib import Path
from peft_scalora.stability import study, sweep_learning_rate

study.GRACE = 10**6  # a busy machine is not a dead process
folder = Path(sys.argv[1])

def train(learning_rate):
    with open(folder / "worker.txt", "a") as log:
        log.write(f"{learning_rate!r}\\n")
    while not (folder / "go").exists():
        time.sleep(0.05)
    return [1.0, abs(learning_rate - 0.1)]

sweep_learning_rate(train, 1e-3, 1.0, 2, output=folder / "study", check_steps=0, plot=False)
"""


@pytest.fixture
def worker(tmp_path):
    """A process of the sweep that is at its first learning rate, until there is a file "go"; and that rate."""
    (tmp_path / "worker.py").write_text(WORKER)
    process = subprocess.Popen([sys.executable, str(tmp_path / "worker.py"), str(tmp_path)], stderr=subprocess.DEVNULL)
    log = tmp_path / "worker.txt"
    while not (log.exists() and log.read_text().endswith("\n")):
        assert process.poll() is None
        time.sleep(0.05)
    yield process, float(log.read_text())
    process.kill()
    process.wait()


def test_two_processes_share_a_study(tmp_path, worker, monkeypatch):
    """What one of them is at, the other leaves to it."""
    process, taken = worker
    monkeypatch.setattr(study, "GRACE", 10**6)
    grid, here = learning_rate_grid(1e-3, 1.0, 2), []

    def train(learning_rate):
        here.append(learning_rate)
        if len(here) == len(grid) - 1:
            (tmp_path / "go").touch()
        return [1.0, abs(learning_rate - 0.1)]

    sweep = sweep_learning_rate(train, 1e-3, 1.0, 2, output=tmp_path / "study", check_steps=0, plot=False)
    assert process.wait() == 0
    assert sorted([*here, taken]) == grid
    assert (tmp_path / "worker.txt").read_text() == f"{taken!r}\n"
    assert sweep.best_learning_rate == pytest.approx(0.1)


@pytest.mark.parametrize("looks", [1, 2, 3])
def test_what_another_process_finishes_between_two_looks_is_not_run_again(tmp_path, monkeypatch, looks):
    point, here, seen = Point("sweep", 0.1), [], []
    mine = Study(sqlite_storage(tmp_path), "learning_rate")
    other = optuna.load_study(storage=sqlite_storage(tmp_path), study_name="learning_rate")
    other.enqueue_trial({}, user_attrs={"point": vars(point)})
    trial = other.ask()
    trial.set_user_attr("losses", [1.0, 0.5])
    get_trials = optuna.Study.get_trials

    def look(self, *arguments, **options):
        found = get_trials(self, *arguments, **options)
        seen.append(found)
        if len(seen) == looks:
            other.tell(trial.number, 0.5)
        return found

    def train(point):
        here.append(point)
        return Run([1.0], 1.0)

    monkeypatch.setattr(optuna.Study, "get_trials", look)
    assert mine.run([point], train, "rates") == {point: Run([1.0, 0.5], 0.5)}
    assert not here


def set_back(database, table, column):
    """Make all times of a column one hour older, in place of an hour's wait."""
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.execute(f"UPDATE {table} SET {column} = datetime({column}, '-1 hour')")


def test_what_a_killed_process_was_at_is_run_again(tmp_path, worker):
    process, lost = worker
    process.send_signal(signal.SIGKILL)
    process.wait()
    set_back(tmp_path / "study" / "study.db", "trial_heartbeats", "heartbeat")
    here = []

    def train(learning_rate):
        here.append(learning_rate)
        return [1.0, abs(learning_rate - 0.1)]

    sweep_learning_rate(train, 1e-3, 1.0, 2, output=tmp_path / "study", check_steps=0, plot=False)
    assert lost in here
    assert sorted(here) == learning_rate_grid(1e-3, 1.0, 2)


def test_what_a_process_killed_as_it_began_was_given_is_run_again(tmp_path):
    """It has left a trial that is running, without a sign of life."""
    rates, here = learning_rate_grid(1e-3, 1.0, 2), []
    began = optuna.create_study(storage=sqlite_storage(tmp_path), study_name="learning_rate")
    began.enqueue_trial({}, user_attrs={"point": vars(Point("sweep", rates[3]))})
    began.ask()
    set_back(tmp_path / "study.db", "trials", "datetime_start")

    def train(learning_rate):
        here.append(learning_rate)
        return [1.0, abs(learning_rate - 0.1)]

    sweep_learning_rate(train, 1e-3, 1.0, 2, output=tmp_path, check_steps=0, plot=False)
    assert sorted(here) == rates


def test_every_run_is_a_line(tmp_path, capsys):
    sweep_learning_rate(quadratic, 1e-2, 1.0, 1, output=tmp_path, check_steps=0, plot=False)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("run ")]
    assert [line.partition(":")[0] for line in lines] == ["run 1 of 3", "run 2 of 3", "run 3 of 3"]
    (blown,) = (line for line in lines if "learning rate 1:" in line)
    assert blown.endswith("after 40 steps, unstable")


def test_only_the_first_run_says_what_transformers_and_warnings_have_to_say(tmp_path):
    """Loading the same model for each run, every one of them would repeat it."""
    levels = []

    def train(learning_rate):
        levels.append((transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()))
        warnings.warn("of every run", UserWarning, stacklevel=1)
        return quadratic(learning_rate)

    before = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        sweep_learning_rate(train, 1e-2, 1.0, 1, output=tmp_path, check_steps=0, plot=False)
    assert levels == [before, (transformers_logging.ERROR, False), (transformers_logging.ERROR, False)]
    assert len([w for w in said if str(w.message) == "of every run"]) == 1
    assert (transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()) == before


def test_a_trainer_is_trained_and_judged_on_its_evaluation_data(tmp_path):
    def train(learning_rate):
        return make_trainer(tmp_path, eval_rows=16, learning_rate=learning_rate, max_steps=5, seed=3)

    sweep = sweep_learning_rate(train, 1e-3, 1e-1, 1, output=tmp_path / "a", check_steps=4, check_rows=3, plot=False)
    for rate, score, losses in zip(sweep.learning_rates, sweep.scores, sweep.losses):
        trainer = train(rate)
        trainer.train()
        assert score == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-5)
        assert losses == pytest.approx([e["loss"] for e in trainer.state.log_history if "loss" in e], rel=1e-5)
    check = train(2 * sweep.best_learning_rate)
    check.args.max_steps = 4
    check.eval_dataset = check.eval_dataset.select(range(3))
    check.args.eval_strategy, check.args.eval_steps = "steps", 1
    check.train()
    expected = [e["eval_loss"] for e in check.state.log_history if "eval_loss" in e]
    assert sweep.check_losses == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match=r"returned a Trainer with learning_rate=1: use the given one"):
        sweep_learning_rate(lambda lr: train(1.0), 1e-3, 1e-2, 1, output=tmp_path / "wrong", plot=False)


def test_ranks_of_one_distributed_training_are_refused(tmp_path, monkeypatch):
    """Under torchrun they would each train a learning rate of their own in one job."""
    tried = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    for search, arguments in ((sweep_learning_rate, (1e-2, 1e-1)), (search_warmup, (1e-3, 1000))):
        with pytest.raises(RuntimeError, match=r"WORLD_SIZE=2.*start separate processes with one storage"):
            search(lambda *point: tried.append(point), *arguments, output=tmp_path, plot=False)
    assert not tried
    monkeypatch.setenv("WORLD_SIZE", "1")
    sweep_learning_rate(quadratic, 1e-2, 1e-1, 1, output=tmp_path, check_steps=0, plot=False)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_model_that_an_earlier_point_has_trained_is_refused(tmp_path, wrapped):
    shared = language_model()

    def train(learning_rate):
        model = shared if not wrapped else copy.copy(shared)  # another module with the same parameters
        return make_trainer(tmp_path, model=model, learning_rate=learning_rate, max_steps=2)

    with pytest.raises(ValueError, match="has trained already: make a new model"):
        sweep_learning_rate(train, 1e-3, 1e-1, 1, output=tmp_path, check_steps=0, plot=False)
    assert len(Study(sqlite_storage(tmp_path), "learning_rate").results()) == 1


def test_no_model_outlives_its_run(tmp_path):
    models, alive = [], []

    def train(learning_rate):
        gc.collect()
        alive.append(sum(model() is not None for model in models))
        trainer = make_trainer(tmp_path, learning_rate=learning_rate, max_steps=1)
        models.append(weakref.ref(trainer.model))
        return trainer

    sweep_learning_rate(train, 1e-3, 1e-1, 1, output=tmp_path, check_steps=0, plot=False)
    assert alive == [0, 0, 0]


def test_scores_do_not_depend_on_the_order_of_the_points(tmp_path):
    """Points are taken at random; what a run draws is the same at all of them."""

    def train(learning_rate):
        return [*torch.randn(2).tolist(), *np.random.randn(2).tolist(), random.random()]

    for name in ("a", "b"):
        torch.manual_seed(len(name))
        sweep = sweep_learning_rate(train, 1e-3, 1e-1, 1, output=tmp_path / name, check_steps=0, plot=False)
        assert sweep.losses[0] == sweep.losses[1] == sweep.losses[2]
    set_seed(study.SEED)
    assert sweep.losses[0] == train(1e-3)


def test_several_evaluation_sets_are_refused_before_training(tmp_path):
    trainers = []

    def train(learning_rate):
        trainers.append(make_trainer(tmp_path, eval_rows=4, learning_rate=learning_rate))
        trainers[-1].eval_dataset = {"a": trainers[-1].eval_dataset, "b": trainers[-1].eval_dataset}
        return trainers[-1]

    with pytest.raises(ValueError, match=r"eval_dataset has several data sets \(a, b\): give one"):
        sweep_learning_rate(train, 1e-3, 1e-1, 1, output=tmp_path, plot=False)
    assert [trainer.state.global_step for trainer in trainers] == [0]


def test_two_processes_may_create_the_storage_at_once(tmp_path):
    """Another one creates all tables after this one has found none."""
    storage = sqlite_storage(tmp_path)
    metadata = optuna.storages._rdb.models.BaseModel.metadata
    event.listen(metadata, "before_create", lambda *_, **__: optuna.storages.RDBStorage(storage), once=True)
    assert Study(storage, "learning_rate").results() == {}


def early_unstable(learning_rate, warmup_steps, max_steps):
    """Stable if the ramp is slower than 1e-3 a step: a cartoon of what warmup mends."""
    slow = learning_rate / warmup_steps <= 1e-3
    t = np.arange(max_steps)
    noise = 0.02 * np.random.default_rng(0).standard_normal(max_steps)
    return (2.0 / (1 + t / max_steps) + noise if slow else 2.0 + 0.3 * t).tolist()


@pytest.mark.parametrize(
    ("unstable_rate", "max_steps", "steps", "rate"),
    [(1e-4, 2000, 10, 1e-2), (1e-3, 2000, 10, 1e-2), (2e-3, 2000, 100, 2e-2), (1.0, 2000, None, None)],
)
def test_the_shortest_stable_warmup(tmp_path, unstable_rate, max_steps, steps, rate):
    result = search_warmup(early_unstable, unstable_rate, max_steps, tmp_path)
    assert result.warmup_steps == steps
    assert result.learning_rate == (None if rate is None else pytest.approx(rate))
    assert {len(run.losses) for run in result.runs} == {30, 300}
    assert {run.learning_rate for run in result.runs} == {10 * unstable_rate, 100 * unstable_rate}
    assert result.total_steps == max_steps + (steps or 0)
    assert (tmp_path / "warmup.png").read_bytes().startswith(b"\x89PNG")
    if steps == 100:
        assert "2000 + 100 = 2100 steps" in result.advice and "more than 5%" not in result.advice


def blow_up(*begin, end, steps):
    """Losses that begin as recorded and come down to `end`, far above where they began."""
    return [*begin, *np.geomspace(begin[-1], end, steps - len(begin)).tolist()]


def test_a_rate_that_destroys_the_run_is_unstable_and_not_recommended(tmp_path):
    """Recorded in fine-tunings of a classifier: a sweep at rate 1, and a warmup to the peak 1."""
    destroyed = {1.0: blow_up(0.69, 0.68, 6.91, 50.0, 184.0, end=24.0, steps=40)}

    def sweep_run(learning_rate):
        return destroyed.get(learning_rate, np.linspace(0.69, 0.69 - learning_rate, 40).tolist())

    sweep = sweep_learning_rate(sweep_run, 1e-2, 1.0, 1, output=tmp_path / "sweep", check_steps=0)
    assert sweep.best_learning_rate == pytest.approx(0.1)
    assert sweep.unstable_base_learning_rate == 1.0

    def warmup_run(learning_rate, warmup_steps, max_steps):
        if learning_rate >= 1.0 and warmup_steps == 10:
            return blow_up(0.69, 1.02, 12.0, 57.0, end=23.0, steps=max_steps)
        return np.linspace(0.69, 0.3, max_steps).tolist()

    warmup = search_warmup(warmup_run, 0.01, 1000, tmp_path / "warmup")
    verdicts = {(run.warmup_steps, round(run.learning_rate, 3)): run.verdict for run in warmup.runs}
    assert verdicts == {(10, 0.1): "stable", (10, 1): "unstable", (100, 0.1): "stable", (100, 1): "stable"}
    assert (warmup.warmup_steps, warmup.learning_rate) == (10, pytest.approx(0.1))


def test_a_warmup_whose_run_is_too_short_to_tell_is_not_recommended(tmp_path):
    result = search_warmup(lambda *point: [1.0, 0.9, 0.8], 1e-3, 1000, tmp_path, plot=False)
    assert {run.verdict for run in result.runs} == {"too short to tell"}
    assert result.warmup_steps is None and "No warmup was stable" in result.advice


def test_long_warmup_wants_longer_training(tmp_path):
    result = search_warmup(early_unstable, 2e-3, 1000, tmp_path, plot=False)
    assert result.warmup_steps == 100
    assert result.advice.endswith("more than 5% of the training: train longer.")
    with pytest.raises(ValueError, match="max_steps=99 is too short"):
        search_warmup(early_unstable, 2e-3, 99, tmp_path, plot=False)


def test_a_trainer_gets_ramp_and_constant_part(tmp_path):
    trainers = []

    def train(learning_rate, warmup_steps, max_steps):
        trainers.append(make_trainer(tmp_path, learning_rate=learning_rate))
        return trainers[-1]

    result = search_warmup(train, 1e-5, 100, tmp_path / "search", plot=False)
    assert all(len(run.losses) == 30 for run in result.runs)
    for trainer in trainers:
        peak = trainer.args.learning_rate
        rates = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
        assert rates == pytest.approx([min(1.0, step / 10) * peak for step in range(30)])


def test_another_check_is_run_anew(tmp_path):
    def train(learning_rate):
        return make_trainer(tmp_path, eval_rows=8, learning_rate=learning_rate, max_steps=2)

    def check(steps, rows):
        sweep = sweep_learning_rate(
            train, 1e-3, 1e-2, 1, output=tmp_path / "sweep", check_steps=steps, check_rows=rows, plot=False
        )
        return sweep.check_losses

    first, longer, wider = check(2, 4), check(3, 4), check(2, 8)
    assert [len(first), len(longer), len(wider)] == [2, 3, 2]
    assert wider[0] != pytest.approx(first[0], rel=1e-4)
    assert check(2, 4) == first
    assert len(Study(sqlite_storage(tmp_path / "sweep"), "learning_rate").results()) == 2 + 3


def test_what_a_sweep_or_search_did_not_find_is_named(tmp_path):
    """None is what sweep and search return where there is nothing to return."""
    sweep = sweep_learning_rate(lambda lr: [1.0, 0.5], 1e-3, 1e-1, 1, output=tmp_path, check_steps=0, plot=False)
    with pytest.raises(ValueError, match=r"unstable_base_learning_rate=None, .* No run was unstable: raise `high`"):
        search_warmup(early_unstable, sweep.unstable_base_learning_rate, 1000, tmp_path / "warmup", plot=False)
    with pytest.raises(ValueError, match=r"warmup_steps=None, .* No warmup was stable: clip gradients"):
        prepend_warmup(lambda step: 1.0, None)
    assert not (tmp_path / "warmup").exists()


def test_warmup_is_put_before_the_schedule():
    def cosine(step):
        return 0.5 * (1 + math.cos(math.pi * step / 100))

    schedule = prepend_warmup(cosine, 10)
    assert [schedule(step) for step in range(10)] == pytest.approx([step / 10 for step in range(10)])
    assert [schedule(step) for step in range(10, 111)] == [cosine(step) for step in range(101)]
