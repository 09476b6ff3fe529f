"""A run is judged by where its loss ends, and by what the detector of instability finds."""

import math

import pytest

from peft_scalora.finetuning.verdict import judge

NOISE = [0.02 * math.sin(7.0 * step) for step in range(60)]
FALLING = [1.0 - step / 80 + NOISE[step] for step in range(60)]
BLOWN = [0.69] + [40 + 5 * noise for noise in NOISE]
SPIKE = FALLING[:40] + [5.0] * 6 + FALLING[46:]


@pytest.mark.parametrize(
    ("losses", "log", "verdict", "said"),
    [
        (FALLING, [], "stable", ""),
        (FALLING, [{"scalora/skipped": 1.0}, {"scalora/skipped": 0.5}], "stable", ""),
        (FALLING, [{"scalora/skipped": 1.0}], "unstable", "the last rescalings skipped every layer. Lower"),
        (BLOWN, [], "diverged", "far above the 0.69 that training began with"),
        ([0.7, 60.0, 400.0], [], "diverged", "far above the 0.7"),
        (SPIKE, [], "unstable", "spike from step 41 to"),
        ([*FALLING, math.nan], [], "diverged", "non-finite from step 61"),
        (FALLING[:5], [], "too short to tell", ""),
        ([], [], "too short to tell", ""),
    ],
)
def test_verdicts(losses, log, verdict, said):
    found = judge(losses, log)
    assert found["verdict"] == verdict
    assert (said in found["advice"]) if said else found["advice"] == ""
