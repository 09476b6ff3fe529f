"""eval/math_problems.py on a tiny model and rows made here: losses, accuracy, what is continued, what is refused."""

import gzip
import json
import random
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from eval import math_problems
from eval.check_answers import check_answers
from eval.check_answers import main as check_answers_main
from eval.harness.rows import DataError
from eval.harness.training import Training
from eval.math_problems import Evaluation, run
from eval.tasks.math_problems import load_problems, load_test

BEFORE = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
TEXTS = {  # what a model might write where 7 is right: strictly and flexibly right, or not
    "gsm8k": [("3 + 4 = 7\n#### 7", 1, 1), ("it is 7", 0, 1), ("#### 7, not 8", 1, 0), ("#### 8", 0, 0)],
    "math": [(r"so $\boxed{\frac{14}{2}}$", 1, 1), ("it is $7$", 0, 1), (r"$\boxed{8}$, not 7", 0, 0), ("", 0, 0)],
}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for every byte, and an EOS; no pad token, as many tokenizers have none."""
    vocabulary = {"<eos>": 0} | {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()), 1)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder)
    set_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=512, initializer_range=0.3, bos_token_id=None, eos_token_id=0, pad_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def gsm8k_rows(count, seed=0):
    draw = random.Random(seed)
    pairs = [(draw.randint(1, 99), draw.randint(1, 9)) for _ in range(count)]
    return [{"question": f"What is {a} plus {b}?", "answer": f"{a} + {b} = {a + b}\n#### {a + b}"} for a, b in pairs]


def math_rows(count, seed=0):
    return [
        {"problem": row["question"], "solution": rf"It is $\boxed{{{row['answer'].split('#### ')[1]}}}$."}
        for row in gsm8k_rows(count, seed + 9)
    ]


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("data")
    for split, count, seed in (("train", 24, 0), ("test", 7, 50)):
        write(folder / f"gsm8k/{split}.jsonl.gz", gsm8k_rows(count, seed))
        write(folder / f"math/{split}.jsonl.gz", math_rows(count, seed))
    return str(folder)


def settings(model_folder, **kwargs):
    defaults = dict(method="scalora", r=2, steps=3, batch_size=2, warmup_steps=0, max_length=400, eval_steps=2)
    return Training(model=model_folder, **defaults | kwargs)


def evaluation(**kwargs):
    defaults = dict(train=("gsm8k", "math"), dev_rows=4, test_rows=4, max_new_tokens=6, eval_batch_size=3)
    return Evaluation(**defaults | kwargs)


def losses_one_by_one(model_folder, pairs) -> list[float]:
    """Mean loss of the solution's bytes and EOS, in float64, each row alone, the template written out."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float64)
    tokenizer = byte_tokenizer()
    losses = []
    for question, solution in pairs:
        start = f"{BEFORE}\n\n### Instruction:\n{question}\n\n### Response: Let's think step by step."
        prompt, answer = (tokenizer(text)["input_ids"] for text in (start, solution))
        answer.append(0)
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0]
        terms = [-torch.log_softmax(logits[len(prompt) + i - 1], -1)[token] for i, token in enumerate(answer)]
        losses.append(float(sum(terms) / len(terms)))
    return losses


def test_the_untrained_model_has_the_losses_of_one_row_at_a_time(model_folder, data_dir, tmp_path):
    path = tmp_path / "run.json"
    result = run(evaluation(generate=False, test_rows=None), settings(model_folder, method="none"), data_dir, str(path))
    pairs = [(r["question"], r["answer"]) for r in gsm8k_rows(7, 50)]
    pairs += [(r["problem"], r["solution"]) for r in math_rows(7, 50)]
    expected = sorted(losses_one_by_one(model_folder, pairs))
    assert sorted(result["predictions"]) == pytest.approx(expected, rel=1e-5)
    assert result["metrics"]["loss"] == pytest.approx(sum(expected) / 14, rel=1e-5)
    assert result["metrics"]["gsm8k_loss"] == pytest.approx(
        sum(losses_one_by_one(model_folder, pairs[:7])) / 7, rel=1e-5
    )
    assert (result["steps"], result["trainable_parameters"], result["metric"]) == (0, 0, "loss")
    assert result["curve"][0]["dev_loss"] > 0
    assert json.loads(path.read_text()) == result
    assert not Path(f"{path}.checkpoints").exists()


def test_accuracy_counts_what_was_generated(model_folder, tmp_path, monkeypatch):
    for split in ("train", "test"):
        write(tmp_path / f"gsm8k/{split}.jsonl.gz", [{"question": f"{i}?", "answer": "#### 7"} for i in range(4)])
        rows = [{"problem": f"{i}?", "solution": r"\boxed{7}"} for i in range(4)]
        write(tmp_path / f"math/{split}.jsonl.gz", rows)
    texts = TEXTS["gsm8k"] + TEXTS["math"]
    monkeypatch.setattr(math_problems, "generate", lambda *args, **kwargs: [text for text, *_ in texts])
    result = run(evaluation(dev_rows=2), settings(model_folder, method="none"), str(tmp_path), str(tmp_path / "r.json"))
    assert [(row["text"], row["strict"], row["flexible"]) for row in result["rows"]] == texts
    assert result["predictions"] == [strict for _, strict, _ in texts]
    counts = {"strict": 3 / 8, "gsm8k_strict": 2 / 4, "math_strict": 1 / 4}
    counts |= {"flexible": 4 / 8, "gsm8k_flexible": 2 / 4, "math_flexible": 2 / 4}
    assert {name: result["metrics"][name] for name in counts} == counts
    assert result["math_verify"] == {"timeouts": 0, "errors": {}}


def test_a_run_that_is_killed_while_it_generates_continues(model_folder, data_dir, tmp_path, monkeypatch):
    args = (evaluation(), settings(model_folder), data_dir)
    whole = run(*args, str(tmp_path / "whole.json"))
    assert whole["curve"][-1]["step"] == whole["steps"] == 3 and len(whole["rows"]) == 8
    assert whole["metric"] == "strict" and whole["trainable_parameters"] > 0
    assert [step for step, _, _ in whole["losses"]] == [1, 2, 3]

    calls = []
    original = LlamaForCausalLM.generate

    def dies_in_the_second_batch(self, **kwargs):
        calls.append(len(kwargs["input_ids"]))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(self, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "generate", dies_in_the_second_batch)
    path = tmp_path / "killed.json"
    with pytest.raises(KeyboardInterrupt):
        run(*args, str(path))
    assert json.loads(path.read_text())["status"] == "failed"
    continued = run(*args, str(path))
    assert sum(calls[2:]) == 8 - 3  # the first batch of three is not repeated
    assert continued["rows"] == whole["rows"] and continued["metrics"] == whole["metrics"]
    assert [point["dev_loss"] for point in continued["curve"]] == [point["dev_loss"] for point in whole["curve"]]
    calls.clear()
    assert run(*args, str(path)) == json.loads(path.read_text()) and not calls  # it is finished


def test_texts_of_another_model_are_not_continued(model_folder, data_dir, tmp_path, monkeypatch):
    folders = []

    def generate(model, tokenizer, prompts, *args, folder, **kwargs):
        folders.append(folder)
        return [""] * len(prompts)

    monkeypatch.setattr(math_problems, "generate", generate)
    run(evaluation(), settings(model_folder, method="none"), data_dir, str(tmp_path / "run.json"))
    (tmp_path / "run.json").unlink()
    run(evaluation(), settings(model_folder), data_dir, str(tmp_path / "run.json"))
    assert folders[0] != folders[1]


def test_rows_that_are_too_long_are_counted(model_folder, data_dir, tmp_path):
    rows = [{"query": "?" * (i % 2) * 300, "response": "#### 1"} for i in range(20)]
    rows = [row | {"query": row["query"] or "short"} for row in rows]
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    chosen = evaluation(train=(str(path),), generate=False)
    result = run(chosen, settings(model_folder, steps=1), data_dir, str(tmp_path / "run.json"))
    assert result["train_rows_left_out"] + result["dev_rows_left_out"] == 10
    assert result["data"]["train"]["rows"] == 16 and result["data"]["train"]["source"] == "own.jsonl"
    assert result["settings"]["train"] == ["own.jsonl"]
    with pytest.raises(ValueError, match="max_length=20 tokens is too short"):
        run(chosen, settings(model_folder, max_length=20), data_dir, str(tmp_path / "short.json"))


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("gsm8k", {"answer": "it is 42"}, r"gsm8k/test.jsonl.gz, row 3: field 'answer' has no answer of the form ####"),
        ("gsm8k", {"question": " "}, "row 3: field 'question' is empty"),
        ("gsm8k", {"answer": None}, "row 3: field 'answer' is missing"),
        ("math", {"solution": "it is $42$"}, r"math/test.jsonl.gz, row 3: field 'solution' has no answer of the"),
        ("math", {"solution": r"it is \boxed{42"}, "row 3: field 'solution' has no answer"),
        ("math", {"problem": 5}, "row 3: field 'problem' is 5, not of type str"),
    ],
)  # fmt: skip
def test_a_bad_row_is_named(tmp_path, name, changes, message):
    rows = gsm8k_rows(5) if name == "gsm8k" else math_rows(5)
    rows[2] |= changes
    write(tmp_path / name / "test.jsonl.gz", rows)
    with pytest.raises(DataError, match=message):
        load_problems(name, "test", str(tmp_path))


def test_an_empty_answer_can_be_trained_on_but_not_tested(tmp_path):
    rows = math_rows(5)
    rows[2]["solution"] = r"There are $\boxed{}$."
    for split in ("train", "test"):
        write(tmp_path / f"math/{split}.jsonl.gz", rows)
    assert len(load_problems("math", "train", str(tmp_path))) == 5
    with pytest.raises(DataError, match=r"math/test.jsonl.gz, row 3: field 'solution' has an empty answer"):
        load_test("math", str(tmp_path), 2)


def test_wrong_columns_and_a_damaged_file_are_named(tmp_path):
    path = tmp_path / "math/test.jsonl.gz"
    write(path, gsm8k_rows(5))
    with pytest.raises(DataError, match=r"row 1: field 'problem' is missing \(the row's fields: question, answer\)"):
        load_problems("math", "test", str(tmp_path))
    write(path, math_rows(50))
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError, match=r"math/test.jsonl.gz, row \d+: the file is damaged or cut short"):
        load_problems("math", "test", str(tmp_path))


def test_rows_of_the_hub(monkeypatch):
    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        return gsm8k_rows(3) if name == "openai/gsm8k" else math_rows(3)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert [row["solution"] for row in load_problems("math", "test", None)] == [r["solution"] for r in math_rows(3)]
    assert load_problems("gsm8k", "train", None).source == "openai/gsm8k:main:train"
    assert asked == [("DigitalLearningGmbH/MATH-lighteval", None, "test"), ("openai/gsm8k", "main", "train")]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"train": ("gsm9k",)}, "train='gsm9k' must be one of gsm8k, math, metamathqa"),
        ({"test_rows": 0}, "test_rows=0 must be at least 1"),
        ({"dev_rows": 0}, "dev_rows=0 must be at least 1"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        evaluation(**changes)


def test_check_answers_counts_and_names_the_misses(data_dir, tmp_path, capsys):
    assert check_answers(data_dir)
    assert "gsm8k/train.jsonl.gz: 24 of 24 (100.00%)" in capsys.readouterr().out
    for name, rows in (("gsm8k", gsm8k_rows(4)), ("math", math_rows(4))):
        for split in ("train", "test"):
            write(tmp_path / name / f"{split}.jsonl.gz", rows)
    rows[1]["solution"] = r"$\boxed{1}$ or $\boxed{2}$"  # math-verify reads a set
    write(tmp_path / "math/test.jsonl.gz", rows)
    assert not check_answers(str(tmp_path))
    assert "math/test.jsonl.gz: 3 of 4 (75.00%), wanted 99%\n  row 2: 2 boxes, the last '2'" in capsys.readouterr().out


def test_the_command(model_folder, data_dir, tmp_path, monkeypatch, capsys):
    options = "--method lora --r 2 --learning-rate 0.01 --steps 1 --batch-size 2 --max-length 400"
    sizes = "--train math --train-rows 8 --dev-rows 2 --test-rows 3 --no-generate"
    command = f"x --model {model_folder} --data-dir {data_dir} {options} {sizes} --output {tmp_path}/run.json"
    monkeypatch.setattr(sys, "argv", command.split())
    math_problems.main()
    result = json.loads((tmp_path / "run.json").read_text())
    assert capsys.readouterr().out.endswith(json.dumps(result["metrics"], indent=1) + "\n")
    expected = {"method": "lora", "train": ["math"], "train_rows": 8, "test_rows": 3, "generate": False, "steps": 1}
    assert {name: result["settings"][name] for name in expected} == expected
    assert len(result["predictions"]) == 6 and result["data"]["train"]["rows"] == 8
    assert "text" not in result["rows"][0]

    monkeypatch.setattr(sys, "argv", f"x --data-dir {data_dir}".split())
    with pytest.raises(SystemExit, match=r"^0$"):
        check_answers_main()
