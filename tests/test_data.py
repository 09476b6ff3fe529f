"""Rows that cannot be trained on are named; labels of any kind become classes; instructions keep their input."""

import json
import tracemalloc

import pytest
from helpers_runs import WORDS, save_encoder, save_language_model, sentences, write_rows
from transformers import AutoTokenizer

from peft_scalora.cli import main
from peft_scalora.finetuning.data import Fields, encode, find_fields, load_rows
from peft_scalora.finetuning.run import FinetuneSettings, finetune, load_data, make_trainer


def run(tmp_path, rows, task="classification", **overrides):
    save = save_language_model if task == "causal-lm" else save_encoder
    settings = dict(
        model=save(tmp_path / "model"),
        data=write_rows(tmp_path / "rows.jsonl", rows),
        task=task,
        output=str(tmp_path / "run"),
        r=2,
        max_steps=1,
    )
    return finetune(FinetuneSettings(**settings | overrides))


def labelled(labels, count=40):
    return [{"sentence": text, "label": labels[i % len(labels)]} for i, text in enumerate(sentences(count))]


@pytest.mark.parametrize("labels", [[1, 2, 3], [-1, 1], ["no", "yes"], [True, False], ["10", "9"], [7, 70]])
def test_labels_of_any_kind_are_classes(tmp_path, labels):
    metrics = run(tmp_path, labelled(labels))
    assert metrics["labels"] == sorted(labels)
    assert 0 <= metrics["eval_accuracy"] <= 1


def test_classes_are_numbered_in_the_order_of_their_labels(tmp_path):
    """The words decide the label: a model that learns them tells which number a label was given."""
    rows = [{"sentence": text, "label": ["yes", "no"][WORDS.index(text.split()[0]) % 2]} for text in sentences(300)]
    ones = [{**row, "label": int(row["label"] == "yes")} for row in rows]
    strings = run(tmp_path, rows, max_steps=20, learning_rate=1e-2)
    (tmp_path / "ones").mkdir()
    numbers = run(tmp_path / "ones", ones, max_steps=20, learning_rate=1e-2)
    assert strings["eval_loss"] == numbers["eval_loss"] and numbers["labels"] == [0, 1]
    config = make_trainer(FinetuneSettings(**strings["settings"])).model.config
    assert config.id2label == {0: "no", 1: "yes"} and config.label2id == {"no": 0, "yes": 1}


def test_whole_numbers_with_a_point_are_classes(tmp_path, capsys):
    """So pandas writes a column of whole numbers that has a gap."""
    metrics = run(tmp_path, labelled([0.0, 1.0]), max_length=3)
    assert metrics["labels"] == [0, 1] and "eval_accuracy" in metrics
    cut = sum(len(text.split()) > 3 for text in sentences(40))
    said = f"2 classes: 0, 1; 32 rows to train, 8 held out, 0 left out for length, {cut} cut at 3 tokens"
    assert said in capsys.readouterr().err
    assert {part: each["rows"] for part, each in metrics["data"].items()} == {"train": 32, "eval": 8}
    assert sum(each["cut"] for each in metrics["data"].values()) == cut


def test_rows_left_out_for_length_are_counted(tmp_path, capsys):
    rows = [{"prompt": "the cat " * (2 if i % 4 else 6), "completion": "sat on"} for i in range(40)]
    metrics = run(tmp_path, rows, task="causal-lm", max_length=6)
    assert sum(each["left_out"] for each in metrics["data"].values()) == 10
    assert sum(each["cut"] for each in metrics["data"].values()) == 30
    assert sum(each["rows"] for each in metrics["data"].values()) == 30
    assert "10 left out for length, 30 cut at 6 tokens" in capsys.readouterr().err


def test_whole_numbers_may_be_regression(tmp_path):
    metrics = run(tmp_path, labelled([1, 2, 5]), task="regression")
    assert "eval_pearson" in metrics and metrics["labels"] is None


def test_fractions_stay_regression(tmp_path):
    metrics = run(tmp_path, labelled([0.5, 1.5, 2.25]), eval_data=write_rows(tmp_path / "e.jsonl", labelled([1, 2])))
    assert "eval_pearson" in metrics and metrics["labels"] is None


def test_a_label_that_training_lacks_is_named(tmp_path):
    others = write_rows(tmp_path / "test.jsonl", labelled(["no", "yes", "perhaps"]))
    with pytest.raises(ValueError, match=r"test\.jsonl', row 3: field 'label' has 'perhaps'.*'no', 'yes'"):
        run(tmp_path, labelled(["no", "yes"]), test_data=others)
    with pytest.raises(ValueError, match=r"test\.jsonl', row 3: field 'label' has 'perhaps'"):
        run(tmp_path, labelled(["no", "yes"]), eval_data=others)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (labelled([0, None, 1]), r"rows\.jsonl', row 2: field 'label' has None"),
        (labelled([[0], [1]]), r"rows\.jsonl', row 1: field 'label' has \[0\]"),
        (labelled([3]), "every row has 3"),
        (labelled([0, "yes"]), "field 'label' mixes numbers and strings \\(0 in row 1, 'yes' in row 2\\)"),
        (labelled([True, 2]), "mixes true or false and numbers \\(True in row 1, 2 in row 2\\)"),
        (labelled([0, 1])[:4], "4 rows"),
        ([*labelled([0, 1]), {"sentence": None, "label": 1}], r"row 41: field 'sentence' has None"),
    ],
)
def test_rows_that_are_no_classification_are_named(tmp_path, rows, said):
    with pytest.raises(ValueError, match=said):
        run(tmp_path, rows)


@pytest.mark.parametrize("completion", [None, ["sat"], {"text": "sat"}])
def test_a_completion_that_is_no_text_is_named(tmp_path, completion):
    rows = [{"prompt": "the cat", "completion": "sat"}] * 6 if completion is None else []
    rows = [*rows, *[{"prompt": "the cat", "completion": completion}] * 6]
    number = 7 if completion is None else 1
    with pytest.raises(ValueError, match=rf"rows\.jsonl', row {number}: field 'completion' has "):
        run(tmp_path, rows, task="causal-lm")


def test_numbers_are_text(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(save_language_model(tmp_path / "model"))
    numbers, words = ([{"prompt": kind(2), "completion": kind(3)}] for kind in (int, str))
    fields = Fields(prompt="prompt", completion="completion")
    encoded = [
        encode(load_rows(write_rows(tmp_path / f"{i}.jsonl", rows)), tokenizer, "causal-lm", fields, 10).to_list()
        for i, rows in enumerate((numbers, words))
    ]
    assert encoded[0] == encoded[1]


def test_data_without_a_field_or_rows_is_named(tmp_path):
    bare = write_rows(tmp_path / "bare.jsonl", [{"sentence": "the cat"}])
    with pytest.raises(ValueError, match=r"bare\.jsonl' has no field 'label'"):
        run(tmp_path, labelled([0, 1]), eval_data=bare)


def test_the_command_names_what_to_hold_out(tmp_path, capsys):
    arguments = ["finetune", "--model", "m", "--data", "d", "--task", "classification", "--output", str(tmp_path / "o")]
    assert main([*arguments, "--eval-rows", "0"]) == 1
    assert "eval_rows=0 must be 1 or more" in capsys.readouterr().err


# Instructions


@pytest.mark.parametrize("given", [Fields(), Fields(prompt="instruction", completion="output")])
def test_the_input_of_an_instruction_is_part_of_the_prompt(tmp_path, given):
    tokenizer = AutoTokenizer.from_pretrained(save_language_model(tmp_path / "model"))
    rows = [
        {"instruction": "the cat", "input": "very red", "output": "sat"},
        {"instruction": "the cat", "input": "", "output": "sat"},
        {"instruction": "the cat", "input": None, "output": "sat"},
    ]
    data = load_rows(write_rows(tmp_path / "rows.jsonl", rows))
    encoded = encode(data, tokenizer, "causal-lm", find_fields(data.column_names, "causal-lm", given), max_length=20)
    texts = [tokenizer.decode(row["input_ids"]) for row in encoded]
    assert texts == ["the cat very red sat [EOS]", "the cat sat [EOS]", "the cat sat [EOS]"]
    assert [row["labels"].count(-100) for row in encoded] == [4, 2, 2]


def test_instructions_without_input_are_as_before(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(save_language_model(tmp_path / "model"))
    data = load_rows(write_rows(tmp_path / "rows.jsonl", [{"instruction": "the cat", "output": "sat"}]))
    fields = find_fields(data.column_names, "causal-lm", Fields())
    assert fields == Fields(prompt="instruction", completion="output")
    assert tokenizer.decode(encode(data, tokenizer, "causal-lm", fields, 20)[0]["input_ids"]) == "the cat sat [EOS]"


def test_the_command_trains_on_string_labels(tmp_path, capsys):
    data = write_rows(tmp_path / "rows.jsonl", labelled(["no", "yes"]))
    arguments = ["--model", save_encoder(tmp_path / "m"), "--data", data, "--task", "classification", "--r", "2"]
    assert main(["finetune", *arguments, "--max-steps", "1", "--output", str(tmp_path / "run")]) == 0
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["labels"] == ["no", "yes"]
    capsys.readouterr()


def test_data_may_be_larger_than_memory(tmp_path):
    """Rows stay on disk: what Python holds of 40 MB of them is what a few of them take."""
    long = "the cat sat on the mat " * 100
    data = write_rows(tmp_path / "rows.jsonl", [{"text": f"{number} {long}"} for number in range(17_000)])
    settings = FinetuneSettings(model="unread", data=data, task="causal-lm", output=str(tmp_path / "run"))
    load_data(settings)  # what is imported or cached at first counts for nothing
    tracemalloc.start()
    rows = load_data(settings).parts["train"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(rows) == 16_500 and peak < 10e6
