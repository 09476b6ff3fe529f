"""The detector's published figures: a part of them is counted anew."""

import json
from dataclasses import asdict

import pytest

from eval.studies import detector

PUBLISHED = json.loads((detector.ROOT / "results" / "stability" / "detector.json").read_text())


def published(group, kind, step=0):
    (row,) = (row for row in PUBLISHED[group] if (row["kind"], row["step"]) == (kind, step))
    return row


@pytest.mark.parametrize("step", [1, 2, 5, 15])
@pytest.mark.parametrize("kind", ["to 40, noise 20%", "to 40, noise e^0.8", "growing 3-fold a step"])
def test_every_explosion_is_found(kind, step):
    row = detector.count_unstable(kind, step)
    assert asdict(row) == published("unstable", kind, step)
    assert row.found == row.right == row.runs == 50 and row.alarms == 0


@pytest.mark.parametrize("kind", ["nan", "spike of 10 steps, four times", "collapse to the start"])
def test_later_kinds(kind):
    row = detector.count_unstable(kind, 100, seeds=10)
    assert row.found == row.right == 10 and row.alarms == 0


@pytest.mark.parametrize("kind", ["plateau at chance, noise 1%", "0 throughout", "early rise of 30% over 10 steps"])
def test_no_false_alarm(kind):
    assert detector.count_healthy(kind, seeds=5).alarms == published("healthy", kind)["alarms"] == 0


def test_recorded_runs():
    """Without those of the residual study, which are not finite in the end."""
    alarms = [
        name
        for name, losses in detector.recorded()
        if "residual" not in name and detector.detect_instability(losses).unstable
    ]
    assert alarms == ["results/glue/sst2/lora-4r-lr0.003-seed0.json"]
    assert sorted(set(PUBLISHED["recorded_unstable"])) == sorted([*alarms, "results/stability/residual_runs.json"])


def test_the_documented_tables_are_those_of_the_result():
    rows = {
        group: [detector.Row(**row) for row in PUBLISHED[group]]
        for group in ("unstable", "healthy", "recorded", "broken")
    }
    document = (detector.ROOT / "docs" / "stability.md").read_text()
    for table in detector.report(rows).split("\n\n"):
        assert table in document
    assert sum(row.runs for row in rows["unstable"] + rows["healthy"]) >= 1000
