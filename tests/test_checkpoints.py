"""Checkpoints after interruptions."""

import itertools
import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from peft_scalora import last_complete_checkpoint

KILLS = 8


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kill") / "runs"
    script = pathlib.Path(__file__).with_name("kill_train.py")
    command = [sys.executable, str(script), str(folder), str(KILLS), "0"]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(script.parent), os.environ["PYTHONPATH"]]),
    }
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stderr[-3000:]
    return folder


def test_a_run_that_is_killed_again_and_again_ends_as_the_unbroken_one(runs):
    unbroken, killed = (
        load_file(runs / name / "final" / "adapter_model.safetensors") for name in ("unbroken", "killed")
    )
    assert unbroken.keys() == killed.keys()
    assert all(torch.equal(unbroken[name], killed[name]) for name in unbroken)
    first, second = (torch.load(runs / name / "final" / "optimizer.pt")["state"] for name in ("unbroken", "killed"))
    assert all(torch.equal(first[k][name], second[k][name]) for k in first for name in first[k])


def test_kills_came_at_every_moment(runs):
    log = json.loads((runs / "kills.json").read_text())
    assert len(log) == KILLS
    resumed = [entry["from"] for entry in log]
    assert len(set(resumed)) >= KILLS // 2, "processes did not go on from one another"
    partial = [entry["newest"] for entry, after in itertools.pairwise(log) if after["from"] != entry["newest"]]
    assert partial, "no kill came while a checkpoint was written"


def write_state(folder, step, text=None):
    (folder / f"checkpoint-{step}").mkdir(parents=True)
    text = json.dumps({"global_step": step}) if text is None else text
    (folder / f"checkpoint-{step}" / "trainer_state.json").write_text(text)


def test_partial_checkpoints_are_passed_over(tmp_path):
    assert last_complete_checkpoint(tmp_path / "missing") is None
    assert last_complete_checkpoint(tmp_path) is None
    (tmp_path / "checkpoint-9").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-40.zip").write_text("")
    assert last_complete_checkpoint(tmp_path) is None
    write_state(tmp_path, 2)
    write_state(tmp_path, 10)
    write_state(tmp_path, 11, '{"global_step": 11')
    write_state(tmp_path, 12, '{"global_step": 7}')
    write_state(tmp_path, 13, "")
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
