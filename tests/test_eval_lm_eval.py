"""lm-eval itself: the same likelihoods and verdicts on the same rows, and ScaLoRA adapters by its own command."""

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from helpers_adapters import save
from helpers_commonsense import CHOICES, WORDS, byte_tokenizer, causal_model, save_model, write_data
from helpers_models import fill, scalora_config
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from eval.harness.likelihood import chosen, chosen_by_length, encode_pair, log_likelihoods
from eval.lm_eval.agreement import lm_eval_scores, our_scores, page
from eval.tasks.commonsense import load_rows
from peft_scalora import export_lora, export_merged

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"

TASK = {
    "task": "mixed_lengths",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "text",
    "doc_to_choice": "choices",
    "doc_to_target": "label",
    "target_delimiter": " ",
    "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")],
}


def mixed_rows(count):
    """Choices of one to six words, in twos to fives, some with letters of several bytes."""
    generator = random.Random(0)
    rows = []
    for _ in range(count):
        choices = [
            " ".join(generator.choices(WORDS, k=generator.randint(1, 6))) for _ in range(generator.randint(2, 5))
        ]
        text = " ".join(generator.choices(WORDS, k=generator.randint(1, 15)))
        rows.append({"text": text, "choices": choices, "label": generator.randrange(len(choices))})
    return rows


def write_task(folder, rows):
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = TASK | {"dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}}}
    (folder / "task.yaml").write_text(yaml.safe_dump(task))


def test_choices_of_mixed_length_are_judged_alike(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = mixed_rows(60)
    write_task(tmp_path, rows)
    model, tokenizer = causal_model(), byte_tokenizer()
    result = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=7),
        tasks=["mixed_lengths"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        log_samples=True,
        bootstrap_iters=0,
    )
    samples = sorted(result["samples"]["mixed_lengths"], key=lambda s: s["doc_id"])
    pairs = [encode_pair(tokenizer, row["text"], " " + choice) for row in rows for choice in row["choices"]]
    values = iter(log_likelihoods(model, pairs, 5))
    verdicts = set()
    for row, sample in zip(rows, samples, strict=True):
        found = [next(values) for _ in row["choices"]]
        assert found == pytest.approx([value for value, _ in sample["filtered_resps"]], abs=2e-4)
        verdict = (chosen(found) == row["label"], chosen_by_length(found, row["choices"]) == row["label"])
        assert verdict == (sample["acc"], sample["acc_norm"])
        verdicts.add(verdict)
    assert len(verdicts) == 4, "the two accuracies have to differ on some rows"


def test_tasks_of_the_same_files_are_judged_alike(tmp_path, monkeypatch):
    """lm-eval builds prompts and choices from its own task files."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write_data(tmp_path, test=8)
    model, tokenizer = causal_model(), byte_tokenizer()
    theirs = lm_eval_scores(model, tokenizer, list(CHOICES), str(tmp_path), 7)
    for task in CHOICES:
        ours = our_scores(model, tokenizer, load_rows(task, "test", str(tmp_path)).part(0, 7))
        assert len(ours) == len(theirs[task]) == 7
        for our, their in zip(ours, theirs[task], strict=True):
            assert our["log_likelihoods"] == pytest.approx(their["log_likelihoods"], abs=2e-4)
            assert (our["acc"], our["acc_norm"]) == (their["acc"], their["acc_norm"])


def test_the_committed_table_is_that_of_its_json():
    result = json.loads((RESULTS / "lm_eval_agreement.json").read_text())
    assert (RESULTS / "lm_eval_agreement.md").read_text() == page(result)
    assert set(result["tasks"]) == set(CHOICES)
    for found in result["tasks"].values():
        assert found["rows_judged_differently"] == 0
        assert found["accuracy"] == found["lm_eval_accuracy"]
        assert found["accuracy_by_length"] == found["lm_eval_accuracy_by_length"]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A base model, a ScaLoRA adapter on it with a filled accumulator, the same merged and as LoRA, and a task."""
    folder = tmp_path_factory.mktemp("lm_eval")
    save_model(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    ids = torch.randint(1, 300, (4, 9), generator=torch.Generator().manual_seed(0))
    model = fill(get_peft_model(base, scalora_config(target_modules="all-linear", task_type="CAUSAL_LM")), inputs=ids)
    save(model, folder / "adapter")
    export_lora(model, folder / "lora")
    export_merged(model, folder / "merged")
    byte_tokenizer().save_pretrained(folder / "merged")
    write_task(folder, mixed_rows(20))
    return folder


def lm_eval_command(folder, command, model_args):
    """The likelihoods that a command of lm-eval logs, by row."""
    output = folder / f"results-{len(list(folder.glob('results-*')))}"
    options = {
        "model": "hf",
        "model_args": model_args,
        "tasks": "mixed_lengths",
        "include_path": str(folder),
        "output_path": str(output),
        "device": "cpu",
        "batch_size": "8",
    }
    arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
    subprocess.run(
        [sys.executable, *command, *arguments, "--log_samples"],
        env=os.environ | {"HF_DATASETS_CACHE": str(folder / "cache"), "HF_DATASETS_OFFLINE": "1"},
        check=True,
        capture_output=True,
        text=True,
    )
    (samples,) = output.rglob("samples_*.jsonl")
    rows = sorted(map(json.loads, samples.read_text(encoding="utf-8").splitlines()), key=lambda row: row["doc_id"])
    return [float(value) for row in rows for value, _ in row["filtered_resps"]]


def lm_eval_in_process(folder, **model):
    """The same by lm-eval's own loader of models and adapters, in this process."""
    result = simple_evaluate(
        model=HFLM(dtype="float32", device="cpu", batch_size=8, **{k: str(folder / v) for k, v in model.items()}),
        tasks=["mixed_lengths"],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        log_samples=True,
        bootstrap_iters=0,
    )
    samples = sorted(result["samples"]["mixed_lengths"], key=lambda s: s["doc_id"])
    return [value for sample in samples for value, _ in sample["filtered_resps"]]


def test_adapters_are_loaded_by_lm_evals_command(adapter, monkeypatch):
    """By the line in the documentation, as the merged model and unlike the base; exported ones by the stock command."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(adapter / "cache"))
    base = f"pretrained={adapter / 'base'},dtype=float32"
    ours = lm_eval_command(adapter, ["-c", one_liner()], f"{base},peft={adapter / 'adapter'}")
    stock = [str(Path(sys.executable).with_name("lm_eval"))]
    exported = lm_eval_command(adapter, stock, f"{base},peft={adapter / 'lora'}")
    merged = lm_eval_in_process(adapter, pretrained="merged")
    assert ours == pytest.approx(merged, abs=1e-3)
    assert exported == pytest.approx(merged, abs=1e-3)
    assert max(abs(a - b) for a, b in zip(ours, lm_eval_in_process(adapter, pretrained="base"), strict=True)) > 0.5


def one_liner():
    """Return what the documentation gives to `python -c` in the place of lm-eval's command."""
    document = (ROOT / "docs" / "evaluation.md").read_text()
    (code,) = re.findall(r'^python -c "(.*cli_evaluate.*)" --model hf', document, re.MULTILINE)
    return code


def test_the_script_is_the_line_in_the_documentation():
    script = (ROOT / "eval" / "lm_eval" / "scalora.py").read_text()
    assert all(statement in script for statement in one_liner().split("; "))
