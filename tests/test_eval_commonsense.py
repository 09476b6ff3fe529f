"""The commonsense script: prompts, checks of the rows, the mixture, scores, and whole runs on a tiny model."""

import gzip
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers_commonsense import CHOICES, byte_tokenizer, causal_model, row, save_model, task_rows, write_data, write_gz
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from eval import commonsense
from eval.harness.rows import DataError
from eval.harness.training import Training
from peft_scalora import effective_rank

EXAMPLE = row(["true", "false"], "true", ["is", "red", "blue"])
PROMPT = """Below is an instruction that describes a task. Write a response that appropriately completes the request.

### Instruction:
Choose: is red blue?

Answer format: true/false

### Response:
"""


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return str(write_data(tmp_path_factory.mktemp("data")))


def settings_for(model_folder, **changes):
    defaults = {"r": 2, "steps": 5, "batch_size": 4, "eval_steps": 2, "save_steps": 2, "max_length": 400}
    return Training(model=model_folder, **defaults | changes)


EVALUATION = commonsense.Evaluation(train_rows=40, dev_rows=16, test_rows=4)


# Prompts and token ids


def test_training_is_on_the_output_only():
    tokenizer = byte_tokenizer()
    (encoded,) = commonsense.encode([EXAMPLE], tokenizer, 400)
    trained = [i for i, label in zip(encoded["input_ids"], encoded["labels"], strict=True) if label != -100]
    assert tokenizer.decode(encoded["input_ids"]) == PROMPT + "the correct answer is true[EOS]"
    assert tokenizer.decode(trained) == "\nthe correct answer is true[EOS]"
    assert encoded["input_ids"][-len(trained) :] == trained


def test_rows_that_are_too_long_are_left_out_whole():
    tokenizer = byte_tokenizer()
    long = row(["true", "false"], "true", ["red"] * 100)
    length = len(tokenizer.encode(PROMPT + EXAMPLE["output"])) + 1
    assert len(commonsense.encode([EXAMPLE, long], tokenizer, length)) == 1
    with pytest.raises(ValueError, match=f"max_length={length - 1}"):
        commonsense.encode([EXAMPLE, long], tokenizer, length - 1)


# Checks of the rows


@pytest.mark.parametrize(
    "change, message",
    [
        ({"answer": "maybe", "output": "the correct answer is maybe"}, "'answer' is 'maybe', not one of the row's"),
        ({"answer": ""}, "'answer' is empty"),
        ({"answer": None}, "'answer' is missing"),
        ({"output": "the correct answer is false"}, "'output' is 'the correct answer is false', not"),
        ({"input": "a passage"}, "'input' is not empty"),
        ({"instruction": "is red blue?"}, "'instruction' does not end with the choices"),
        ({"instruction": "is red blue?\n\nAnswer format: true/perhaps"}, "'instruction' has the choices true/perhaps"),
    ],
)
def test_bad_rows_are_named_with_file_row_and_field(change, message, tmp_path):
    rows = [*task_rows("boolq", 2), EXAMPLE | change]
    write_gz(tmp_path / "commonsense" / "boolq" / "test.jsonl.gz", rows)
    with pytest.raises(DataError, match=re.escape("boolq/test.jsonl.gz, row 3: field " + message)):
        commonsense.load_rows("boolq", "test", str(tmp_path))


def test_wrong_columns_are_named(tmp_path):
    write_gz(tmp_path / "commonsense" / "piqa" / "train.jsonl.gz", [{"goal": "x", "label": 0}])
    with pytest.raises(DataError, match=r"row 1: field 'instruction' is missing \(the row's fields: goal, label"):
        commonsense.load_rows("piqa", "train", str(tmp_path))


def test_a_file_that_is_cut_short_is_named(tmp_path):
    path = tmp_path / "commonsense" / "boolq" / "test.jsonl.gz"
    write_gz(path, task_rows("boolq", 50))
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError, match=r"boolq/test.jsonl.gz, row \d+: the file is damaged or cut short"):
        commonsense.load_rows("boolq", "test", str(tmp_path))


def test_unknown_tasks_and_scorings_are_refused():
    with pytest.raises(ValueError, match="tasks='arc' must be one of boolq, piqa"):
        commonsense.Evaluation(tasks=("boolq", "arc"))
    with pytest.raises(ValueError, match="task='arc' must be one of"):
        commonsense.load_rows("arc", "test", None)
    with pytest.raises(ValueError, match="scoring='perplexity' must be one of"):
        commonsense.Evaluation(scoring="perplexity")


def test_without_a_folder_rows_come_from_the_hub(monkeypatch):
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return task_rows("hellaswag", 3)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert list(commonsense.load_rows("hellaswag", "test", None)) == task_rows("hellaswag", 3)
    assert list(commonsense.load_rows("mixture", "train", None)) == task_rows("hellaswag", 3)
    url = "https://raw.githubusercontent.com/AGI-Edgerunners/LLM-Adapters/main/dataset/hellaswag/test.json"
    assert asked == [
        (("json",), {"data_files": {"test": url}, "split": "test"}),
        (("zwhe99/commonsense_170k", None), {"split": "train"}),
    ]
    with pytest.raises(ValueError, match="the hub's mixture is of all tasks"):
        commonsense.load_mixture(["boolq"], None, None, 8)


# The mixture


def test_every_task_gives_as_many_rows(data_dir):
    train, dev = commonsense.load_mixture(list(CHOICES), data_dir, 40, 17)
    assert [len(part) for part in train] == [5] * 8 and [len(part) for part in dev] == [2] * 8
    for task, train_part, dev_part in zip(CHOICES, train, dev, strict=True):
        rows = task_rows(task, 12, "train")
        taken = [rows.index(r) for part in (train_part, dev_part) for r in part]
        assert len(set(taken)) == 7, "train and dev rows have to be apart"
    again = commonsense.load_mixture(list(CHOICES), data_dir, 40, 17)
    assert [part.record for part in again[0]] == [part.record for part in train]
    assert sum(map(len, commonsense.load_mixture(list(CHOICES), data_dir, None, 16)[0])) == 8 * 10


@pytest.mark.parametrize("count", [88, 7])
def test_a_mixture_that_cannot_be_equal_is_refused(count, data_dir):
    with pytest.raises(ValueError, match=f"train_rows={count} is .* rows of each of 8 parts, and boolq has"):
        commonsense.load_mixture(list(CHOICES), data_dir, count, 16)


# Scores


@pytest.fixture(scope="module")
def oracle():
    """Sum of log-probabilities of every choice of every row, by the model's own loss in float64, one at a time."""
    model, tokenizer = causal_model().double(), byte_tokenizer()

    def values(row):
        context = len(tokenizer.encode(commonsense.prompt(row).rstrip()))
        found, counts = [], []
        for choice in row["instruction"].split("Answer format: ")[1].split("/"):
            ids = torch.tensor([tokenizer.encode(f"{commonsense.prompt(row)}the correct answer is {choice}")])
            labels = ids.clone()
            labels[:, :context] = -100
            counts.append(ids.shape[1] - context)
            with torch.no_grad():
                found.append(-float(model(ids, labels=labels).loss) * counts[-1])
        return found, counts

    return values


def test_likelihood_scores_and_their_summary(oracle):
    by_task = {}
    model, tokenizer = causal_model(), byte_tokenizer()
    expected, loss, tokens = {}, 0.0, 0
    for task in ("boolq", "ARC-Easy"):
        rows = task_rows(task, 9 if task == "boolq" else 15)
        by_task[task] = commonsense.score_by_likelihood(model, tokenizer, rows, 4, task)
        right = 0
        for r, score in zip(rows, by_task[task], strict=True):
            values, counts = oracle(r)
            answers = r["instruction"].split("Answer format: ")[1].split("/")
            gold = answers.index(r["answer"])
            assert score.correct == (max(values) == values[gold])
            per_character = [v / len(f"the correct answer is {a}") for v, a in zip(values, answers, strict=True)]
            assert score.by_length == (max(per_character) == per_character[gold])
            assert score.loss == pytest.approx(-values[gold], abs=2e-4) and score.tokens == counts[gold]
            right, loss, tokens = right + score.correct, loss - values[gold], tokens + counts[gold]
        expected[task] = right / len(rows)
    metrics = commonsense.total(by_task)
    assert 0 < expected["boolq"] < 1
    assert metrics["accuracy_boolq"] == expected["boolq"] and metrics["accuracy_ARC-Easy"] == expected["ARC-Easy"]
    assert metrics["accuracy"] == pytest.approx(sum(expected.values()) / 2)  # of tasks, not of rows
    assert metrics["answer_loss"] == pytest.approx(loss / tokens, rel=1e-5)


@pytest.mark.parametrize(
    "task, text, answer",
    [
        ("boolq", " the correct answer is true", "true"),
        ("boolq", "false, not true", "false"),
        ("boolq", "True", None),
        ("ARC-Easy", "answer5 or answer1", "answer5"),
        ("winogrande", "the correct answer is answer1", None),
        ("hellaswag", "", None),
    ],
)
def test_the_first_answer_in_a_generated_text_counts(task, text, answer):
    assert commonsense.extract_answer(task, text) == answer


def test_generation_is_scored_by_its_first_answer(monkeypatch, tmp_path):
    rows = task_rows("piqa", 6)
    texts = {commonsense.prompt(r): f" {r['output']} {i}" if i % 3 else "solution7" for i, r in enumerate(rows)}

    def generate(model, tokenizer, prompts, max_new_tokens, batch_size, folder):
        assert max_new_tokens == 32
        return [texts[prompt] for prompt in prompts]

    monkeypatch.setattr(commonsense, "generate", generate)
    scores = commonsense.score_by_generation(None, None, rows, "piqa", 4, str(tmp_path))
    assert [score.correct for score in scores] == [0, 1, 1, 0, 1, 1]
    assert set(commonsense.total({"piqa": scores})) == {"accuracy", "accuracy_piqa"}


# Whole runs


@pytest.fixture(scope="module")
def whole(model_folder, data_dir, tmp_path_factory):
    """An uninterrupted run."""
    output = str(tmp_path_factory.mktemp("whole") / "run.json")
    commonsense.run(EVALUATION, settings_for(model_folder), data_dir, output)
    return output


def read(path):
    return json.loads(Path(path).read_text())


def test_a_run_leaves_one_json(whole, model_folder, data_dir):
    result = read(whole)
    assert result["status"] == "finished" and result["task"] == "commonsense" and result["metric"] == "accuracy"
    assert [Path(whole).name] == [path.name for path in Path(whole).parent.iterdir()]
    assert result["settings"] | {"method": "scalora", "scoring": "likelihood", "train_rows": 40} == result["settings"]
    assert [part["rows"] for part in result["data"]["train"]] == [5] * 8
    assert [part["rows"] for part in result["data"]["test"]] == [4] * 8
    assert [point["step"] for point in result["curve"]] == [2, 4, 5]
    assert [step for step, *_ in result["losses"]] == [1, 2, 3, 4, 5]
    assert result["curve"][-1]["answer_loss"] < result["curve"][0]["answer_loss"]
    assert {"accuracy", "accuracy_by_length", "answer_loss"} <= set(result["curve"][0])
    assert result["prediction_tasks"] == [task for task in CHOICES for _ in range(4)]
    for task in CHOICES:
        right = [p for p, t in zip(result["predictions"], result["prediction_tasks"], strict=True) if t == task]
        assert result["metrics"][f"accuracy_{task}"] == sum(right) / 4
    assert commonsense.run(EVALUATION, settings_for(model_folder), data_dir, whole) == result  # nothing is repeated
    with pytest.raises(ValueError, match=r"other settings \(learning_rate="):
        commonsense.run(EVALUATION, settings_for(model_folder, learning_rate=7.0), data_dir, whole)


def test_a_kept_adapter_scores_as_its_run_did(model_folder, data_dir, tmp_path):
    output = str(tmp_path / "run.json")
    settings = settings_for(model_folder, scaling_interval=1, learning_rate=3e-3)
    result = commonsense.run(EVALUATION, settings, data_dir, output, keep_adapter=True)
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    model = PeftModel.from_pretrained(model, f"{output}.adapter").eval()
    assert max(effective_rank(model).values()) > settings.r  # the accumulator is not empty
    assert read(output)["adapter"] == "run.json.adapter"
    assert commonsense.run(EVALUATION, settings, data_dir, output, keep_adapter=True) == read(output)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    rows = commonsense.load_rows("piqa", "test", data_dir).part(0, 4)
    with torch.no_grad():
        scores = commonsense.score_by_likelihood(model, tokenizer, rows, 16, "piqa")
    assert commonsense.summary(scores)["answer_loss"] == pytest.approx(result["metrics"]["answer_loss_piqa"], rel=1e-5)


def test_an_adapter_that_cannot_be_kept_is_refused(whole, model_folder, data_dir, tmp_path):
    Path(f"{whole}.adapter").mkdir()  # of another run that was there
    with pytest.raises(ValueError, match="is finished, and its adapter was not kept"):
        commonsense.run(EVALUATION, settings_for(model_folder), data_dir, whole, keep_adapter=True)
    Path(f"{whole}.adapter").rmdir()
    output = tmp_path / "run.json"
    for method in ("full", "relora", "none"):
        settings = settings_for(model_folder, method=method)
        with pytest.raises(ValueError, match=f"method='{method}' has no adapter"):
            commonsense.run(EVALUATION, settings, data_dir, str(output), keep_adapter=True)
    assert not output.exists()


@pytest.mark.parametrize("where", ["dev", "winogrande"])
def test_a_run_continues_where_it_was_interrupted(where, whole, model_folder, data_dir, tmp_path, monkeypatch):
    """In training, at the evaluation of step 4, and in scoring: the result is that of the uninterrupted run."""
    output, calls = str(tmp_path / "run.json"), []
    original = commonsense.log_likelihoods

    def interrupted(model, pairs, batch_size, description):
        calls.append(description)
        if calls.count(where) == (2 if where == "dev" else 1):
            raise KeyboardInterrupt
        return original(model, pairs, batch_size, description)

    monkeypatch.setattr(commonsense, "log_likelihoods", interrupted)
    with pytest.raises(KeyboardInterrupt):
        commonsense.run(EVALUATION, settings_for(model_folder), data_dir, output)
    assert read(output)["status"] == "failed"
    with pytest.raises(ValueError, match=r"an interrupted run with other settings \(learning_rate="):
        commonsense.run(EVALUATION, settings_for(model_folder, learning_rate=7.0), data_dir, output)
    calls.clear()
    monkeypatch.setattr(commonsense, "log_likelihoods", lambda *args: calls.append(args[3]) or original(*args))
    result = commonsense.run(EVALUATION, settings_for(model_folder), data_dir, output)
    if where == "winogrande":  # what was scored is not scored again
        assert calls == ["dev", "winogrande", "ARC-Easy", "ARC-Challenge", "openbookqa"]
    expected = read(whole)
    for name in ("metrics", "predictions", "data", "tokens", "steps"):
        assert result[name] == expected[name]
    assert [loss for *_, loss in result["losses"]] == [loss for *_, loss in expected["losses"]]
    assert not Path(f"{output}.checkpoints").exists()


def test_the_untrained_model_over_two_processes(model_folder, data_dir, tmp_path):
    command = [
        "-m", "eval.commonsense", "--model", model_folder, "--data-dir", data_dir, "--method", "none",
        "--test-rows", "5", "--dev-rows", "16", "--output",
    ]  # fmt: skip
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    subprocess.run([*launch, *command, str(tmp_path / "two.json")], check=True, capture_output=True)
    evaluation = commonsense.Evaluation(test_rows=5, dev_rows=16)
    one = commonsense.run(
        evaluation, Training(model_folder, method="none", max_length=512), data_dir, str(tmp_path / "one.json")
    )
    two = read(tmp_path / "two.json")
    assert two["environment"]["processes"] == 2 and two["trainable_parameters"] == 0
    assert two["predictions"] == one["predictions"] and len(one["predictions"]) == 40
    assert two["metrics"]["answer_loss"] == pytest.approx(one["metrics"]["answer_loss"], rel=1e-5)


def test_a_run_with_generation(model_folder, data_dir, tmp_path):
    """From prompts to the JSON; what counts as right is tested above."""
    evaluation = commonsense.Evaluation(
        tasks=("boolq", "piqa"), scoring="generation", train_rows=2, dev_rows=2, test_rows=3
    )
    result = commonsense.run(evaluation, settings_for(model_folder, steps=1), data_dir, str(tmp_path / "run.json"))
    assert len(result["predictions"]) == 6 and set(result["predictions"]) <= {0, 1}
    assert set(result["metrics"]) == {"accuracy", "accuracy_boolq", "accuracy_piqa"}
    assert "answer_loss" in result["curve"][0]


def test_data_files_may_be_of_another_compression_level(data_dir, tmp_path):
    """The hash in the JSON is of the rows, not of the file."""
    rows = commonsense.load_rows("boolq", "test", data_dir)
    path = tmp_path / "commonsense" / "boolq" / "test.jsonl.gz"
    path.parent.mkdir(parents=True)
    text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
    path.write_bytes(gzip.compress(text.encode(), compresslevel=1))
    assert commonsense.load_rows("boolq", "test", str(tmp_path)).record == rows.record
