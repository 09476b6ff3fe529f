"""The quickstart with a model and data of one's own, whatever is to be learned, and with its own model and text."""

import os
import pathlib
import statistics

import pytest
from helpers_runs import save_encoder, save_language_model, sentences, write_rows

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"


@pytest.fixture
def quickstart(monkeypatch, tmp_path):
    """The script's `main`, which is told a model and rows to train and to test on."""
    monkeypatch.syspath_prepend(EXAMPLES)
    import quickstart as module

    def run(model, rows, *options):
        data = write_rows(tmp_path / "train.jsonl", rows)
        words = ["quickstart.py", "--model", model, "--data", data, "--test-data", data, "--r", "2", "--steps", "2"]
        words += ["--batch-size", "2", "--learning-rates", "1e-3", "--seeds", "2", "--output", str(tmp_path / "out")]
        monkeypatch.setattr("sys.argv", [*words, *options])
        module.main()

    return run


def rows_of(kind):
    if kind == "three classes":
        return [{"sentence": text, "label": i % 3} for i, text in enumerate(sentences(30))], "Matthews"
    if kind == "regression":
        return [{"sentence": text, "label": i / 7} for i, text in enumerate(sentences(30))], "Pearson"
    return [{"text": text} for text in sentences(30)], "held-out loss"


@pytest.mark.parametrize("kind", ["three classes", "regression", "text"])
def test_it_compares_lora_of_both_ranks_and_scalora_on_rows_of_any_task(tmp_path, quickstart, capsys, kind):
    rows, result = rows_of(kind)
    quickstart((save_language_model if kind == "text" else save_encoder)(tmp_path / "model"), rows)
    printed = capsys.readouterr().out
    for number, name in enumerate(("LoRA, r = 2", "LoRA, r = 4", "ScaLoRA, r = 2")):
        assert f"run {number + 1} of 6: {name}" in printed
    assert result in printed and "time of a step over the first's" in printed


def test_other_settings_go_into_another_folder_and_more_seeds_into_the_same(tmp_path, quickstart):
    rows, _ = rows_of("text")
    model = save_language_model(tmp_path / "model")
    quickstart(model, rows, "--seeds", "1")
    quickstart(model, rows, "--seeds", "1", "--batch-size", "3")
    assert len(os.listdir(tmp_path / "out")) == 2
    quickstart(model, rows)
    assert len(os.listdir(tmp_path / "out")) == 2
    logs = [path.read_text() for path in (tmp_path / "out").glob("*/*.log")]
    assert sum("nothing was trained" in log for log in logs) == 3


def test_the_table_has_means_and_paired_differences_with_their_standard_errors(quickstart):
    import quickstart as module

    def runs(losses):
        fixed = {"settings": {"learning_rate": 0.1}, "trainable_parameters": 5, "effective_rank": 2.0}
        return [{"test_loss": loss, "checkpoint_bytes": 1024, **fixed} for loss in losses]

    losses = {"lora": [1.0, 1.2, 1.1], "scalora": [0.9, 1.0, 1.0]}
    found = {module.Contender(method, 4): runs(values) for method, values in losses.items()}
    table = module.format_table(found, dict.fromkeys(found, 1.0))
    assert f"| 1.100 ± {statistics.stdev(losses['lora']) / 3**0.5:.3f} |" in table
    assert f"| -0.133 ± {statistics.stdev([-0.1, -0.2, -0.1]) / 3**0.5:.3f} |" in table


def test_the_small_model_is_made_once_and_reads_its_own_text(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(EXAMPLES)
    import small_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setattr(small_model, "PRETRAINING_STEPS", 2)
    folder = small_model.small_model(str(tmp_path))
    written = os.stat(os.path.join(folder, "model.safetensors")).st_mtime_ns
    assert small_model.small_model(str(tmp_path)) == folder
    assert os.stat(os.path.join(folder, "model.safetensors")).st_mtime_ns == written
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = small_model.sentences("held_out", 3, 0)[0]
    ids = tokenizer(text).input_ids
    assert tokenizer.unk_token_id not in ids and len(ids) == len(text)
    assert AutoModelForCausalLM.from_pretrained(folder).config.vocab_size == len(tokenizer)


def test_readme_shows_the_figures_of_a_whole_run():
    root = EXAMPLES.parent
    published = (root / "results" / "quickstart.md").read_text().splitlines()
    readme = (root / "README.md").read_text().splitlines()
    names = ("| |", "| trained numbers", "| held-out loss")
    for name in names:
        row = next(line for line in published if line.replace("|  |", "| |").startswith(name))
        assert row.replace("|  |", "| |") in readme
