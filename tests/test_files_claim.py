"""Telling one run from another by its recorded settings."""

import json

import pytest

from peft_scalora.files.claim import changed_settings, refuse_other_run

THERE = {"rate": 0.1, "names": ["a", "b"], "data": {"rows": 3}, "old": None}


def test_settings_are_the_same_after_they_were_written_and_read():
    here = {"rate": 0.1, "names": ("a", "b"), "data": {"rows": 3}, "new": None}
    refuse_other_run("run.json holds a run", json.loads(json.dumps(here)), here, "never seen")
    refuse_other_run("run.json holds a run", THERE, here, "never seen")


@pytest.mark.parametrize(
    "change, told",
    [
        ({"rate": 0.2}, "rate=0.1 there, 0.2 here"),
        ({"names": ("a",)}, "names"),
        ({"data": {"rows": 4}, "rate": "auto"}, "data, rate=0.1 there, 'auto' here"),
        ({"new": True}, "new=None there, True here"),
    ],
)
def test_another_run_is_refused_with_what_differs(change, told):
    with pytest.raises(ValueError) as error:
        refuse_other_run("run.json holds a run", THERE, THERE | change, "choose another --output")
    assert str(error.value) == f"run.json holds a run with other settings ({told}): choose another --output."


def test_a_setting_that_the_run_leaves_out_differs_unless_it_may_change():
    here = {name: value for name, value in THERE.items() if name != "rate"}
    assert changed_settings(THERE, here) == ["rate=0.1 there, None here"]
    assert changed_settings(THERE, here, may_change={"rate"}) == []
