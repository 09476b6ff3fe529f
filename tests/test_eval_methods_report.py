"""The table of eval/methods.py: each row is of its seeds, and the published ones are those of their runs."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from eval import methods
from eval.optimizing import report


def result_of(name, seed, quality, size):
    settings = {"row": name, "seed": seed, "model": "M", "steps": 5, "batch_size": 4, "max_length": 9, "r": 8}
    return {
        "status": "finished", "task": "methods/glue/sst2", "environment": {"threads": 1}, "metric": "accuracy",
        "settings": settings | {"full_learning_rate": 1e-4, "learning_rate": 1e-3}, "method": "m", "caveat": "c",
        "data": {"test": [{"rows": 6}, {"rows": 7}]}, "metrics": {"accuracy": quality, "loss": 2 * quality},
        "parameters": 3e6, "nonzeros": 2e6, "bytes": size, "memory_bytes": 5e6, "latency_ratio": 0.5,
        "throughput_ratio": 2.0, "seconds": 7.0 + seed, "reload": "equal",
    }  # fmt: skip


def test_table_is_of_the_results(tmp_path):
    qualities = [0.5, 0.75, 0.9]
    for seed, quality in enumerate(qualities):
        (tmp_path / f"a-seed{seed}.json").write_text(json.dumps(result_of("a", seed, quality, 4e6)))
    (tmp_path / "b-seed0.json").write_text(json.dumps(result_of("b", 0, 0.8, 3e6)))
    report.write_report(str(tmp_path), ["b", "a", "c"])
    caption, _, *lines = (tmp_path / "methods.md").read_text().splitlines()
    assert caption.startswith("M on glue/sst2, 13 test rows. Whatever trains does so for 5 steps of 4 rows")
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert [row[0] for row in cells] == ["row", "---", "b", "a"]
    assert cells[0][:5] == ["row", "accuracy", "loss", "seeds", "parameters, M"]
    mean, error = np.mean(qualities), np.std(qualities, ddof=1) / math.sqrt(3)
    assert cells[3][:5] == ["a", f"{mean:.3f} ± {error:.3f}", f"{2 * mean:.3f}", "3", "3.0"]
    assert (cells[2][1], cells[2][3]) == ("0.800", "1")
    assert cells[3][10] == "8"
    assert all(len(row) == len(cells[0]) for row in cells)


def test_a_seed_that_failed_leaves_the_others_and_its_reason_stays_one_cell(tmp_path):
    error = {"status": "failed", "error": "ValueError: a | b\nand a long trace"}
    runs = [result_of("a", 0, 0.5, 4e6), result_of("a", 1, 0.1, 4e6) | error, result_of("a", 2, 0.7, 4e6)]
    for seed, result in enumerate([*runs, result_of("b", 3, 0.1, 4e6) | error]):
        row = result["settings"]["row"]
        (tmp_path / f"{row}-seed{seed}.json").write_text(json.dumps(result))
    report.write_report(str(tmp_path), ["a", "b"])
    lines = (tmp_path / "methods.md").read_text().splitlines()[2:]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    assert len(cells) == 4 and all(len(row) == len(cells[0]) for row in cells)
    assert cells[2][:4] == ["a", "0.600 ± 0.100", "1.200", "2 of 3"]
    assert cells[2][-1] == r"c; seed 1: ValueError: a \| b"
    assert cells[3][:3] == ["b", r"ValueError: a \| b", ""]


RESULTS = Path(__file__).parents[1] / "results" / "methods"


@pytest.mark.parametrize("folder", sorted(RESULTS.iterdir()), ids=lambda path: path.name)
def test_published_tables_are_those_of_their_runs(folder):
    by_row = report.read_all(str(folder))
    rows = report.summaries(by_row, list(methods.MODULE_OF))
    assert (folder / "methods.md").read_text() == report.page(by_row, rows)
    results = [result for runs in by_row.values() for result in runs]
    assert all(result["status"] == "finished" and result.get("reload", "equal") == "equal" for result in results)


def test_a_published_adapter_has_a_parameter_for_four_bytes_on_disk():
    """What the adapter adds to the quantized model: the files have headers besides, of less than 1%."""
    compared = 0
    for folder in RESULTS.iterdir():
        by_row = report.read_all(str(folder))
        for row in ("torchao-int8", "bnb-int8", "bnb-nf4"):
            alone = {result["settings"]["seed"]: result for result in by_row.get(row, ())}
            for result in by_row.get(f"{row}+scalora", ()):
                before = alone[result["settings"]["seed"]]
                added = {name: result[name] - before[name] for name in ("bytes", "parameters", "nonzeros")}
                assert added["bytes"] == pytest.approx(4 * added["parameters"], rel=0.01)
                assert added["nonzeros"] <= added["parameters"]
                compared += 1
    assert compared >= 5


def test_pareto_front_is_of_points_that_none_beats():
    rng = np.random.default_rng(0)
    for _ in range(20):
        points = [tuple(p) for p in rng.integers(0, 6, (12, 2)).tolist()]
        front = [points[i] for i in report.pareto_front(points)]
        beaten = [any((q[0] <= p[0] and q[1] >= p[1] and q != p) for q in points) for p in points]
        assert sorted(set(front)) == sorted({p for p, lost in zip(points, beaten) if not lost})
