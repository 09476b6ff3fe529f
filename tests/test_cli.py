"""The command's arguments: help, typos, files of settings, and errors in one line, all before torch is imported."""

import json
import os
import subprocess
import sys
from dataclasses import fields

import pytest

from peft_scalora.cli import main
from peft_scalora.finetuning.settings import FinetuneSettings
from peft_scalora.version import __version__

COMMANDS = ("finetune", "evaluate", "generate", "info", "export", "trl", "sweep-lr", "search-warmup")
REQUIRED = ("--model=m", "--data=d", "--task=causal-lm", "--output=o")


@pytest.fixture
def without_torch(tmp_path):
    """The command in a process in which torch, PEFT and transformers cannot be imported."""
    for name in ("torch", "peft", "transformers", "datasets"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('{name} was imported')")
    path = os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]])

    script = tmp_path / "peft-scalora"  # as pip writes it
    script.write_text("import sys\nfrom peft_scalora.cli import main\nsys.exit(main())\n")

    def run(*arguments, start=("-m", "peft_scalora")):
        command = [sys.executable, *(start or [str(script)]), *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path})

    return run


def test_version_and_help_are_answered_without_torch(without_torch):
    assert without_torch("--version").stdout == f"peft-scalora {__version__}\n"
    listed = without_torch("--help").stdout
    assert all(f"    {name}" in listed for name in COMMANDS)
    assert "--lr-scheduler-type" in without_torch("finetune", "--help").stdout


def test_the_installed_script_is_as_fast(without_torch):
    assert without_torch("--version", start=None).stdout == f"peft-scalora {__version__}\n"


def test_mistakes_are_answered_without_torch(without_torch):
    typo = without_torch("finetune", "--learnin-rate", "1")
    assert (typo.returncode, "did you mean --learning-rate?" in typo.stderr) == (2, True)
    value = without_torch("finetune", *REQUIRED, "--max-steps", "0")
    assert (value.returncode, value.stderr.count("\n")) == (1, 1)
    assert "max_steps=0 must be 1 or more" in value.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_help(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    options = capsys.readouterr().out.split("options:")[1]
    entries = [entry.split() for entry in options.split("\n  -")[1:]]
    for entry in entries:
        assert any(word.islower() and not word.startswith(("-", "{")) for word in entry), entry


def test_every_setting_has_help():
    assert all(setting.metadata["help"] for setting in fields(FinetuneSettings))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["fintune"], "unknown command fintune: did you mean finetune?"),
        ([], "a command is missing: finetune, "),
        (["finetune", "--modle", "x"], "unknown argument --modle: did you mean --model?"),
        (["export", "a", "b", "--rnk=3"], "unknown argument --rnk=3: did you mean --rank?"),
        (["export", "a", "b", "--dtype=int8"], "argument --dtype: invalid choice: 'int8' (choose from"),
        (["finetune", "a.yaml", "b.yaml"], "unknown argument b.yaml"),
        (["info"], "the following arguments are required: adapter"),
    ],
)
def test_arguments_that_are_not_understood(capsys, arguments, said):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
    printed = capsys.readouterr().err
    assert said in printed and printed.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "model, data, task, output missing: give --model, --data, --task, --output"),
        ([*REQUIRED, "--smoothness", "abc"], "smoothness='abc' must be a number or auto"),
        ([*REQUIRED, "--task", "other"], "task='other' must be one of causal-lm, classification, regression"),
        ([*REQUIRED, "--r", "eight"], "r='eight' must be a whole number"),
        (["none.yaml"], "settings='none.yaml' cannot be read: No such file"),
    ],
)
def test_values_that_are_not_allowed(capsys, monkeypatch, tmp_path, arguments, said):
    monkeypatch.chdir(tmp_path)
    assert main(["finetune", *arguments]) == 1
    printed = capsys.readouterr().err
    assert said in printed and printed.count("\n") == 1
    assert not os.listdir(tmp_path)  # nothing is written before arguments and data are known to fit


@pytest.fixture
def taken(monkeypatch):
    """The settings that `finetune` is called with."""
    found = []

    def finetune(settings):
        found.append(settings)
        raise ValueError("enough")

    monkeypatch.setattr("peft_scalora.finetuning.run.finetune", finetune)
    return found


def test_options_may_have_underscores(taken):
    main(["finetune", *REQUIRED, "--max_steps=3", "--load_in_4bit", "--no_bf16"])
    assert (taken[0].max_steps, taken[0].load_in_4bit, taken[0].bf16) == (3, True, False)


@pytest.mark.parametrize("form", ["yaml", "json", "settings.json"])
def test_settings_come_from_a_file_and_options_override(tmp_path, taken, form):
    values = {"model": "m", "data": "a_b", "task": "causal-lm", "output": "o", "learning_rate": 3e-4, "r": 4}
    path = tmp_path / f"run.{form}"
    if form == "yaml":
        path.write_text("model: m\ndata: a_b\ntask: causal-lm\noutput: o\nlearning-rate: 3e-4\nr: 4\n")
    else:
        path.write_text(json.dumps({"settings": values, "data_hashes": {}} if form == "settings.json" else values))
    main(["finetune", str(path), "--r", "2"])
    assert (taken[0].data, taken[0].learning_rate, taken[0].r) == ("a_b", 3e-4, 2)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("learning_rat: 1", "has 'learning_rat', no setting of a run: did you mean learning_rate?"),
        ("- 1", "holds no settings"),
        ("a: [", "is neither YAML nor JSON"),
    ],
)
def test_a_file_that_holds_no_settings_is_refused(tmp_path, capsys, text, said):
    (tmp_path / "run.yaml").write_text(text)
    assert main(["finetune", str(tmp_path / "run.yaml"), *REQUIRED]) == 1
    assert said in capsys.readouterr().err


def test_a_search_refuses_what_it_sets_itself(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text("learning_rate: 1e-3")
    assert main(["sweep-lr", str(path), *REQUIRED]) == 1
    assert "learning_rate cannot be set for a search" in capsys.readouterr().err


def test_traceback_shows_where(taken):
    assert main(["finetune", *REQUIRED]) == 1
    with pytest.raises(ValueError, match="enough"):
        main(["finetune", *REQUIRED, "--traceback"])


@pytest.mark.parametrize("checkpoint", [None, 6])
def test_an_interruption_says_how_to_go_on(tmp_path, monkeypatch, capsys, checkpoint):
    def finetune(settings):
        if checkpoint:
            (tmp_path / "run" / f"checkpoint-{checkpoint}").mkdir(parents=True)
            state = json.dumps({"global_step": checkpoint})
            (tmp_path / "run" / f"checkpoint-{checkpoint}" / "trainer_state.json").write_text(state)
        raise KeyboardInterrupt

    monkeypatch.setattr("peft_scalora.finetuning.run.finetune", finetune)
    assert main(["finetune", *REQUIRED, f"--output={tmp_path / 'run'}"]) == 130
    said = "after checkpoint-6: the same command goes on from there" if checkpoint else "the same command starts anew"
    assert said in capsys.readouterr().err
