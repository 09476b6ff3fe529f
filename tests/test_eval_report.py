"""Tables from JSONs: every figure against NumPy and SciPy, and what is missing or failed shown."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from eval import report
from eval.harness.statistics import paired_rows, paired_seeds

RNG = np.random.default_rng(1)
REFERENCES = RNG.integers(0, 2, 60).tolist()
RATES = (1e-3, 3e-3, 1e-2)


def run(method, rate, seed, accuracy, seconds=10.0):
    """A finished run of SST-2 with so many right answers on average, its dev metric best at 3e-3."""
    right = np.random.default_rng([seed, len(method)]).random(60) < accuracy
    predictions = np.where(right, REFERENCES, 1 - np.array(REFERENCES)).tolist()
    dev = accuracy - abs(np.log10(rate / 3e-3))
    return {
        "task": "glue/sst2",
        "status": "finished",
        "data": {"train": {"rows": 320}},
        "settings": {"method": method, "learning_rate": rate, "seed": seed},
        "metric": "accuracy",
        "dev_metric": "accuracy",
        "trainable_parameters": 1000 * len(method),
        "effective_rank": 4.0 + seed if method != "full" else None,
        "steps": 20,
        "train_seconds": seconds,
        "peak_memory_bytes": 100 * 2**20,
        "losses": [[i, i * seconds / 20, 1 / i] for i in range(1, 21)],
        "curve": [{"step": s, "seconds": s * seconds / 20, "accuracy": dev - (20 - s) / 100} for s in (5, 10, 20)],
        "metrics": {"accuracy": float(np.mean(np.array(predictions) == REFERENCES))},
        "predictions": predictions,
        "references": REFERENCES,
    }


def failed(method, rate, seed):
    settings = {"method": method, "learning_rate": rate, "seed": seed}
    return {"status": "failed", "settings": settings, "error": "exit status -9 | see its log\nline two"}


def write(folder, runs, methods, seeds=3):
    (folder / "plan.json").write_text(json.dumps({"methods": methods, "seeds": seeds, "rates": RATES}))
    for r in runs:
        s = r["settings"]
        name = f"{s['method'].replace(',', '-')}-lr{s['learning_rate']:g}-seed{s['seed']}.json"
        (folder / name).write_text(json.dumps(r))


def whole(method, accuracy, seconds=10.0):
    """The grid on seed 0, and seeds 1 and 2 at its best."""
    at = [(rate, 0) for rate in RATES] + [(3e-3, 1), (3e-3, 2)]
    return [run(method, rate, seed, accuracy, seconds) for rate, seed in at]


def cells(table):
    """Method -> its cells, by column."""
    header, _, *rows = [[c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table.splitlines()]
    return {row[0]: dict(zip(header, row)) for row in rows}


def test_every_figure_is_that_of_the_runs(tmp_path):
    runs = whole("lora", 0.6) + whole("scalora", 0.9, seconds=20.0)
    write(tmp_path, runs, ["lora", "scalora"])
    table = cells(report.table(str(tmp_path), "lora"))
    best = [[r for r in runs if r["settings"]["method"] == m and r["settings"]["learning_rate"] == 3e-3] for m in table]
    scores = [[r["metrics"]["accuracy"] for r in group] for group in best]
    for row, values in zip(table.values(), scores):
        assert row["accuracy"] == f"{np.mean(values):.3f} ± {stats.sem(values):.3f}"
        assert row["learning rate (tried)"] == "0.003 (0.001, 0.003, 0.01)"
        assert row["seeds"] == "3 of 3" and row["rank"] == "5.0" and row["MiB"] == "100"
    assert table["scalora"]["s a step"] == "1.000" and table["scalora"]["trainable"] == "7,000"
    difference = table["scalora"]["over lora (p; 95% of rows)"]
    assert stats.ttest_rel(*scores[::-1]).pvalue < 0.01
    assert difference.startswith(f"{np.mean(scores[1]) - np.mean(scores[0]):+.3f} (p < 0.01; ")
    # After lora's 10 seconds, scalora has made 10 of its 20 steps.
    assert table["scalora"]["dev accuracy at lora's steps"] == "0.900 ± 0.000"
    assert table["scalora"]["within its seconds"] == "0.800 ± 0.000"
    assert table["lora"]["within its seconds"] == table["lora"]["dev accuracy at lora's steps"]


def test_seconds_are_those_of_the_baseline_run_of_the_same_seed(tmp_path):
    """Seeds of LoRA took 9, 10 and 11 seconds, those of the other method 12: it is read off between its points."""
    slow = [
        r if r["settings"]["learning_rate"] != 3e-3 else run("lora", 3e-3, s, 0.6, 9.0 + s)
        for r in whole("lora", 0.6)
        for s in [r["settings"]["seed"]]
    ]
    write(tmp_path, slow + whole("dora", 0.6, seconds=12.0), ["lora", "dora"])
    table = cells(report.table(str(tmp_path), "lora"))
    assert table["lora"]["within its seconds"] == table["lora"]["dev accuracy at lora's steps"] == "0.600 ± 0.000"
    # The curve has -0.15, -0.10 and 0.00 at 3, 6 and 12 seconds.
    expected = [0.6 - 0.1 * (12 - seconds) / 6 for seconds in (9, 10, 11)]
    assert table["dora"]["within its seconds"] == f"{np.mean(expected):.3f} ± {stats.sem(expected):.3f}"


def test_the_interval_of_commonsense_is_of_the_mean_over_tasks(tmp_path):
    """Right answers differ in the small task only: rows that are drawn anew have to weigh it as the metric does."""
    tasks = ["large"] * 50 + ["small"] * 10
    both = []
    for name, right in (("lora", 0.0), ("dora", 1.0)):
        for r in whole(name, 0.5):
            predictions = [1.0] * 50 + [right] * 10
            metrics = {"accuracy": (1.0 + right) / 2}
            both.append(
                r | {"task": "commonsense", "prediction_tasks": tasks, "predictions": predictions, "metrics": metrics}
            )
    write(tmp_path, both, ["lora", "dora"])
    assert (
        cells(report.table(str(tmp_path), "lora"))["dora"]["over lora (p; 95% of rows)"] == "+0.500 (+0.500 to +0.500)"
    )


def test_what_failed_or_is_missing_is_shown(tmp_path):
    some = [r for r in whole("lora", 0.6) if r["settings"]["seed"] != 2]
    lost = [failed("hira", rate, 0) for rate in RATES]
    partly = [*whole("dora", 0.7)[:4], failed("dora", 3e-3, 2)]
    write(tmp_path, some + lost + partly, ["lora", "hira", "dora", "mora"])
    table = cells(report.table(str(tmp_path), "lora"))
    assert table["lora"]["seeds"] == "2 of 3"
    assert table["dora"]["seeds"] == "2 of 3, 1 failed"
    assert table["hira"]["learning rate (tried)"] == r"all failed: exit status -9 \| see its log"
    assert table["mora"]["learning rate (tried)"] == "not run"


def test_a_best_rate_at_an_end_is_said(tmp_path):
    runs = [r for r in whole("lora", 0.6) if r["settings"]["learning_rate"] != 1e-3]
    write(tmp_path, runs, ["lora"])
    assert "best at an end" in cells(report.table(str(tmp_path), "lora"))["lora"]["learning rate (tried)"]


def test_an_unknown_baseline_is_named(tmp_path):
    write(tmp_path, whole("lora", 0.6), ["lora"])
    with pytest.raises(ValueError, match="baseline='dora' is not in the sweep: lora"):
        report.table(str(tmp_path), "dora")


def test_the_untrained_model_is_compared_with_every_seed(tmp_path):
    lora, none = whole("lora", 0.6), run("none", 1e-3, 0, 0.5) | {"losses": []}
    write(tmp_path, [*lora, none], ["none", "lora"])
    scores = [r["metrics"]["accuracy"] for r in lora if r["settings"]["learning_rate"] == 3e-3]
    expected = none["metrics"]["accuracy"] - np.mean(scores)
    cell = cells(report.table(str(tmp_path), "lora"))["none"]["over lora (p; 95% of rows)"]
    assert cell.startswith(f"{expected:+.3f} (p = {stats.ttest_1samp(scores, none['metrics']['accuracy']).pvalue:.2f}")
    low, high = map(float, re.search(r"; (\S+) to (\S+)\)", cell).groups())
    assert low < expected < high


def test_the_dev_metric_is_read_at_the_steps_of_the_baseline(tmp_path):
    """The baseline made 10 steps, where the other's curve has 0.1 less than at its end."""
    short = [r | {"curve": r["curve"][:2]} for r in whole("lora", 0.6)]
    write(tmp_path, short + whole("dora", 0.6), ["lora", "dora"])
    assert cells(report.table(str(tmp_path), "lora"))["dora"]["dev accuracy at lora's steps"] == "0.500 ± 0.000"


def test_runs_of_other_rows_are_not_compared(tmp_path):
    other = [r | {"data": {"train": {"rows": 9}}} for r in whole("dora", 0.6)]
    write(tmp_path, whole("lora", 0.6) + other, ["lora", "dora"])
    with pytest.raises(ValueError, match="runs of other rows"):
        report.table(str(tmp_path), "lora")


def test_the_summary_has_a_column_for_every_task(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    write(tmp_path / "one", whole("lora", 0.6) + whole("full", 0.9), ["lora", "full", "mora"])
    other = [r | {"task": "commonsense"} for r in whole("lora", 0.7)]
    write(tmp_path / "two", other, ["lora"])
    table = cells(report.summary([str(tmp_path / "one"), str(tmp_path / "two")]))
    scores = [r["metrics"]["accuracy"] for r in other if r["settings"]["learning_rate"] == 3e-3]
    assert table["lora"]["commonsense (accuracy)"] == f"{np.mean(scores):.3f} ± {stats.sem(scores):.3f}"
    assert table["full"]["sst2 (accuracy)"].count("±") == 1 and table["full"]["commonsense (accuracy)"] == ""
    assert table["mora"]["sst2 (accuracy)"] == "none yet"


@pytest.mark.parametrize("trained", [whole("lora", 0.6) + whole("full", 0.9), []], ids=["trained", "untrained"])
def test_plots_are_drawn(trained, tmp_path):
    write(tmp_path, [run("none", 1e-3, 0, 0.5) | {"losses": []}, *trained], ["none", "lora", "full", "mora"])
    methods, _ = report.load_sweep(str(tmp_path))
    report.plot_curves(methods, str(tmp_path / "curves.png"))
    report.plot_quality(methods, str(tmp_path / "quality.png"))
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("curves.png", "quality.png"))


def test_paired_seeds_is_the_paired_t_test():
    first, second = RNG.normal(size=5), RNG.normal(size=5)
    difference = second - first
    t = difference.mean() / (difference.std(ddof=1) / 5**0.5)
    value, p = paired_seeds(first, second)
    assert value == pytest.approx(difference.mean()) and p == pytest.approx(2 * stats.t.sf(abs(t), 4))
    assert paired_seeds([1.0], [2.0]) == (1.0, None)


def test_rows_are_drawn_in_pairs():
    """The interval of a mean of paired differences is that of the normal approximation, not of two samples."""
    common = RNG.normal(size=(2, 400)) * 10
    first, second = common, common + 1 + 0.5 * RNG.normal(size=(2, 400))
    low, high = paired_rows(first, second, lambda values, rows: float(values.mean()))
    difference = (second - first).mean(0)
    half = 1.96 * difference.std() / 20
    assert low == pytest.approx(difference.mean() - half, abs=0.2 * half)
    assert high == pytest.approx(difference.mean() + half, abs=0.2 * half)


RESULTS = Path(__file__).parents[1] / "results"
SWEEPS = sorted(path.parent for path in RESULTS.rglob("plan.json"))


@pytest.mark.parametrize("folder", SWEEPS, ids=lambda path: str(path.relative_to(RESULTS)))
def test_published_tables_are_those_of_their_runs(folder):
    assert (folder / "report.md").read_text() == report.table(str(folder), "lora") + "\n"


@pytest.mark.parametrize("folder", SWEEPS, ids=lambda path: str(path.relative_to(RESULTS)))
def test_no_published_method_is_best_at_an_end_of_its_grid(folder):
    methods, _ = report.load_sweep(str(folder))
    assert not [method.name for method in methods.values() if method.best and method.at_edge]


def test_the_summary_in_the_readme_is_that_of_all_sweeps():
    folders = [*sorted(RESULTS.glob("glue/*")), RESULTS / "commonsense", RESULTS / "math_problems"]
    assert sorted(folders) == SWEEPS
    table = report.summary([str(folder) for folder in folders])
    assert (RESULTS / "summary.md").read_text() == table + "\n"
    assert table in (RESULTS.parent / "README.md").read_text()
