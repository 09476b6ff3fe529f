"""The quickstart with a model and data of one's own, whatever is to be learned from them."""

import importlib.util
import os
import pathlib

import pytest
from helpers_runs import save_encoder, save_language_model, sentences, write_rows

SCRIPT = pathlib.Path(__file__).parents[1] / "examples" / "quickstart.py"


@pytest.fixture
def quickstart(monkeypatch, tmp_path):
    """The script's `main`, which is told a model and rows to train and to test on."""
    spec = importlib.util.spec_from_file_location("quickstart", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(model, rows, *options):
        data = write_rows(tmp_path / "train.jsonl", rows)
        words = ["quickstart.py", "--model", model, "--data", data, "--test-data", data, "--r", "2", "--steps", "2"]
        words += ["--batch-size", "2", "--learning-rates", "1e-3", "--output", str(tmp_path / "out"), *options]
        monkeypatch.setattr("sys.argv", words)
        module.main()

    return run


def rows_of(kind):
    if kind == "three classes":
        return [{"sentence": text, "label": i % 3} for i, text in enumerate(sentences(30))], "Matthews"
    if kind == "regression":
        return [{"sentence": text, "label": i / 7} for i, text in enumerate(sentences(30))], "Pearson"
    return [{"text": text} for text in sentences(30)], "held-out loss"


@pytest.mark.parametrize("kind", ["three classes", "regression", "text"])
def test_it_compares_both_methods_on_rows_of_any_task(tmp_path, quickstart, capsys, kind):
    rows, result = rows_of(kind)
    quickstart((save_language_model if kind == "text" else save_encoder)(tmp_path / "model"), rows)
    printed = capsys.readouterr().out
    assert "run 1 of 2: lora" in printed and "run 2 of 2: scalora" in printed
    assert result in printed and "s/step, alternating" in printed


def test_other_settings_go_into_another_folder(tmp_path, quickstart, capsys):
    rows, _ = rows_of("text")
    model = save_language_model(tmp_path / "model")
    quickstart(model, rows)
    quickstart(model, rows, "--seed", "1")
    capsys.readouterr()
    quickstart(model, rows)  # again: nothing is trained
    assert capsys.readouterr().err.count("nothing was trained") == 2
    assert len(os.listdir(tmp_path / "out")) == 2
