"""The sweep on a stand-in script whose dev metric is a known function of the learning rate."""

import json
import math
from unittest.mock import patch

import pytest

from eval.sweep import best_rate, main, next_rate, option

# Writes a run whose dev metric is best at the rate OPTIMUM; crashes, or leaves nothing, at some rates.
SCRIPT = """
import json, math, os, sys
a = dict(zip(sys.argv[1::2], sys.argv[2::2]))
rate, seed = float(a["--learning-rate"]), int(a["--seed"])
with open(a["--calls"], "a") as file:
    print(a["--method"], f"{rate:g}", seed, a.get("--scaling-interval", "-"), file=file)
if rate >= float(a.get("--crash-from", "inf")):
    os._exit(3)
distance = abs(math.log10(rate / float(a["--optimum"])))
value = distance if a["--metric"] == "dev_loss" else -distance
result = {
    "status": "finished",
    "settings": {"learning_rate": rate, "seed": seed},
    "dev_metric": a["--metric"],
    "curve": [{a["--metric"]: value}],
}
json.dump(result, open(a["--output"], "w"))
"""


def sweep(tmp_path, *methods, seeds=2, rates=("1e-3", "1e-2"), **options):
    """Run the command; the runs it started as (method, rate, seed, scaling_interval)."""
    script, calls = tmp_path / "script.py", tmp_path / "calls"
    script.write_text(SCRIPT)
    calls.write_text("")
    passed = {"optimum": "1e-2", "metric": "accuracy"} | options
    command = ["sweep.py", "--module", "script", "--methods", *methods, "--rates", *rates]
    command += ["--seeds", str(seeds), "--output", str(tmp_path / "runs"), "--", "--calls", str(calls)]
    command += [part for name, value in passed.items() for part in (f"--{name.replace('_', '-')}", value)]
    with patch("sys.argv", command), patch.dict("os.environ", {"PYTHONPATH": str(tmp_path)}):
        main()
    return [tuple(line.split()) for line in calls.read_text().splitlines()]


@pytest.mark.parametrize("metric", ["accuracy", "dev_loss"])
def test_the_grid_grows_until_its_best_has_neighbours_and_seeds_are_of_the_best(tmp_path, metric):
    calls = sweep(tmp_path, "lora", seeds=3, optimum="0.2", metric=metric)
    assert [rate for _, rate, seed, _ in calls if seed == "0"] == ["0.001", "0.01", "0.1", "1"]
    assert [(rate, seed) for _, rate, seed, _ in calls if seed != "0"] == [("0.1", "1"), ("0.1", "2")]


def test_the_grid_grows_downwards_too(tmp_path):
    calls = sweep(tmp_path, "lora", optimum="2e-4", seeds=1)
    assert [rate for _, rate, _, _ in calls] == ["0.001", "0.01", "0.0001", "1e-05"]


def test_every_method_has_the_same_grid_and_its_own_settings(tmp_path):
    calls = sweep(tmp_path, "lora", "scalora,scaling_interval=1", seeds=1, rates=("1e-3", "1e-2", "1e-1"))
    rates = ["0.001", "0.01", "0.1"]
    assert calls == [("lora", r, "0", "-") for r in rates] + [("scalora", r, "0", "1") for r in rates]
    assert json.loads((tmp_path / "runs" / "plan.json").read_text())["methods"] == [
        "lora",
        "scalora,scaling_interval=1",
    ]


def test_a_sweep_that_is_done_runs_nothing_and_one_run_that_is_missing_runs_alone(tmp_path):
    first = sweep(tmp_path, "lora", rates=("1e-3", "1e-2", "1e-1"))
    assert len(first) == 4
    assert sweep(tmp_path, "lora", rates=("1e-3", "1e-2", "1e-1")) == []
    (tmp_path / "runs" / "lora-lr0.01-seed1.json").unlink()
    assert sweep(tmp_path, "lora", rates=("1e-3", "1e-2", "1e-1")) == [("lora", "0.01", "1", "-")]


def test_methods_may_be_added_and_nothing_else_changed(tmp_path):
    rates = ("1e-3", "1e-2", "1e-1")
    sweep(tmp_path, "lora", rates=rates)
    calls = sweep(tmp_path, "dora", rates=rates)
    assert {method for method, *_ in calls} == {"dora"}
    assert json.loads((tmp_path / "runs" / "plan.json").read_text())["methods"] == ["lora", "dora"]
    with pytest.raises(ValueError, match=r"of a sweep with other settings \(arguments\): choose another --output"):
        sweep(tmp_path, "lora", rates=rates, optimum="1e-4")
    with pytest.raises(ValueError, match=r"of a sweep with other settings \(seeds=2 there, 1 here\)"):
        sweep(tmp_path, "lora", rates=rates, seeds=1)


def test_a_crash_is_recorded_and_the_best_of_the_others_chosen(tmp_path):
    sweep(tmp_path, "lora", rates=("1e-3", "1e-2", "1e-1"), seeds=2, optimum="0.09", crash_from="0.05")
    crashed = json.loads((tmp_path / "runs" / "lora-lr0.1-seed0.json").read_text())
    assert crashed["status"] == "failed" and "exit status 3" in crashed["error"]
    assert crashed["settings"]["learning_rate"] == 0.1 and (tmp_path / "runs" / "lora-lr0.1-seed0.json.log").exists()
    assert (tmp_path / "runs" / "lora-lr0.01-seed1.json").exists()


def test_a_method_that_always_crashes_ends_its_sweep(tmp_path):
    calls = sweep(tmp_path, "lora", rates=("1e-3", "1e-2", "1e-1"), crash_from="0")
    assert len(calls) == 3


def test_the_best_of_equals_is_nearest_to_the_middle():
    assert best_rate({1e-4: 0.0, 1e-3: 0.0, 1e-2: 0.0}) == 1e-3
    assert best_rate({1e-4: 0.5, 1e-3: 0.0, 1e-2: 0.4}) == 1e-4


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({1e-3: 1.0, 3e-3: 0.5, 1e-2: 0.1}, 3.3e-4),
        ({1e-3: 0.1, 3e-3: 0.5, 1e-2: 1.0}, 3.3e-2),
        ({1e-3: 0.1, 3e-3: 0.5, 1e-2: 0.2}, None),
        ({1e-3: 0.1, 3e-3: 0.5, 1e-2: 0.5}, 3.3e-2),  # as good at an end
        ({1e-3: 0.5, 3e-3: 0.5, 1e-2: 0.5}, 3.3e-2),  # a plateau: up, then down
        ({1e-3: 0.5, 3e-3: 0.5, 1e-2: 0.5, 3.3e-2: 0.5}, 3.3e-4),
        ({1e-3: -math.inf, 3e-3: -math.inf, 1e-2: -math.inf}, None),  # all have failed
    ],
)
def test_the_next_rate_keeps_the_ratio_of_the_grid(values, expected):
    assert next_rate(values) == (pytest.approx(expected) if expected else None)


def test_a_grid_that_could_not_grow_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        sweep(tmp_path, "lora", rates=("1e-3", "1.02e-3"))
    assert "each 1.2 times the one before" in capsys.readouterr().err


def test_the_latest_failure_is_the_one_that_is_told(tmp_path):
    rates = ("1e-3", "1e-2", "1e-1")
    path = tmp_path / "runs" / "lora-lr0.1-seed0.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"status": "failed", "error": "an old one"}))
    sweep(tmp_path, "lora", rates=rates, seeds=1, crash_from="0.05")
    assert "exit status 3" in json.loads(path.read_text())["error"]


def test_options_of_a_method():
    assert option("save_adapter=True") == ["--save-adapter"]
    assert option("scaling_interval=1") == ["--scaling-interval", "1"]
    assert option("moment_transport=False") == ["--no-moment-transport"]
