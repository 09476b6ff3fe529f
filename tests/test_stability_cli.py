"""The commands sweep-lr and search-warmup on a tiny model."""

import json

import pytest
from helpers_runs import classification_rows, save_classifier, write_rows

from peft_scalora.cli import main


@pytest.fixture
def settings(tmp_path):
    model, data = save_classifier(tmp_path / "model"), write_rows(tmp_path / "train.jsonl", classification_rows(80))
    return ["--model", model, "--data", data, "--task", "classification", "--output", str(tmp_path / "out"), "--r", "2"]


def test_sweep(tmp_path, settings, capsys):
    options = ["--low", "1e-3", "--high", "1e-1", "--per-decade", "1", "--check-steps", "3", "--max-steps", "4"]
    assert main(["sweep-lr", *settings, *options]) == 0
    sweep = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert sweep["learning_rates"] == pytest.approx([1e-3, 1e-2, 1e-1])
    assert [len(losses) for losses in sweep["losses"]] == [4, 4, 4]
    assert len(sweep["check_losses"]) == 3
    said = capsys.readouterr()
    assert f"best learning rate {sweep['best_learning_rate']:g}" in said.out
    assert f"runs and plot are in {tmp_path / 'out'}" in said.out
    assert "None" not in said.out
    lines = [line.partition(":")[0] for line in said.err.splitlines() if line.startswith("run ")]
    assert lines == ["run 1 of 3", "run 2 of 3", "run 3 of 3", "run 1 of 1"]
    assert "step 1/" not in said.out + said.err  # a run is a line
    assert (tmp_path / "out" / "sweep.png").exists()
    options[options.index("--check-steps") + 1] = "2"
    assert main(["sweep-lr", *settings, *options]) == 0
    assert len(json.loads((tmp_path / "out" / "sweep.json").read_text())["check_losses"]) == 2
    assert main(["sweep-lr", *settings, *options, "--seed", "1"]) == 1
    assert "with other settings (seed)" in capsys.readouterr().err


def test_warmup(tmp_path, settings, capsys):
    assert main(["search-warmup", *settings, "--unstable-learning-rate", "1e-4", "--max-steps", "100"]) == 0
    warmup = json.loads((tmp_path / "out" / "warmup.json").read_text())
    assert {run["warmup_steps"] for run in warmup["runs"]} == {10}
    assert [run["learning_rate"] for run in warmup["runs"]] == pytest.approx([1e-3, 1e-2])
    assert [len(run["losses"]) for run in warmup["runs"]] == [30, 30]
    assert "100 + 10 = 110 steps" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["search-warmup", *settings, "--unstable-learning-rate", "1e-4"])
    assert "the following arguments are required: --max-steps" in capsys.readouterr().err
