"""Compare zero-shot accuracies of eval/commonsense.py with lm-evaluation-harness's, of one model and its rows.

python -m eval.lm_eval.agreement --model M --data-dir D --test-rows 50 --output results/lm_eval_agreement.json
"""

from __future__ import annotations

import argparse
import os
import tempfile

from lm_eval import __version__ as lm_eval_version
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from eval.harness.likelihood import chosen, chosen_by_length, encode_pair, log_likelihoods
from eval.harness.models import load_causal_lm
from eval.harness.record import recorded
from eval.harness.rows import Rows
from eval.harness.training import Training, settings_of
from eval.lm_eval.tasks import task_name, write_tasks
from eval.tasks.commonsense import OUTPUT, TASKS, choices, load_rows, prompt
from peft_scalora.files.atomic import replace_file
from peft_scalora.files.tables import markdown

BATCH_SIZE = 8
COLUMNS = ("accuracy", "lm_eval_accuracy", "accuracy_by_length", "lm_eval_accuracy_by_length")


def our_scores(model, tokenizer, rows: Rows) -> list[dict]:
    """Return log-likelihoods of every row's choices, and whether the chosen one is right."""
    texts = [[OUTPUT + choice for choice in choices(row)] for row in rows]
    pairs = [encode_pair(tokenizer, prompt(row), c) for row, found in zip(rows, texts, strict=True) for c in found]
    values = iter(log_likelihoods(model, pairs, BATCH_SIZE))
    scores = []
    for row, found in zip(rows, texts, strict=True):
        right, likelihoods = found.index(row["output"]), [next(values) for _ in found]
        scores.append(
            {
                "log_likelihoods": likelihoods,
                "acc": int(chosen(likelihoods) == right),
                "acc_norm": int(chosen_by_length(likelihoods, found) == right),
            }
        )
    return scores


def lm_eval_scores(model, tokenizer, tasks: list[str], data_dir: str, rows: int) -> dict[str, list[dict]]:
    """Return the scores of lm-eval, which reads the files and writes the prompts itself."""
    with tempfile.TemporaryDirectory() as folder:
        names = write_tasks(folder, data_dir, tasks)
        found = simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH_SIZE),
            tasks=names,
            task_manager=TaskManager(include_path=folder, include_defaults=False),
            limit=rows,
            log_samples=True,
            bootstrap_iters=0,
        )
    scores = {}
    for task in tasks:
        samples = sorted(found["samples"][task_name(task)], key=lambda s: s["doc_id"])
        scores[task] = [
            {
                "log_likelihoods": [value for value, _ in sample["filtered_resps"]],
                "acc": int(sample["acc"]),
                "acc_norm": int(sample["acc_norm"]),
            }
            for sample in samples
        ]
    return scores


def compare(ours: list[dict], theirs: list[dict]) -> dict:
    """Return accuracies of both, rows that they judge differently, and how far their log-likelihoods are apart."""
    pairs = list(zip(ours, theirs, strict=True))
    apart = [
        abs(a - b)
        for our, their in pairs
        for a, b in zip(our["log_likelihoods"], their["log_likelihoods"], strict=True)
    ]
    return {
        "rows": len(pairs),
        "accuracy": sum(our["acc"] for our in ours) / len(ours),
        "lm_eval_accuracy": sum(their["acc"] for their in theirs) / len(theirs),
        "accuracy_by_length": sum(our["acc_norm"] for our in ours) / len(ours),
        "lm_eval_accuracy_by_length": sum(their["acc_norm"] for their in theirs) / len(theirs),
        "rows_judged_differently": sum(
            our["acc"] != their["acc"] or our["acc_norm"] != their["acc_norm"] for our, their in pairs
        ),
        "log_likelihoods": len(apart),
        "largest_difference_nats": max(apart),
    }


def page(result: dict) -> str:
    """Return the comparison in Markdown, with the command that made it."""
    settings, environment = result["settings"], result["environment"]
    about = (
        f"{settings['model']} in {settings['dtype']}, untrained, on the first {settings['test_rows']} rows of every "
        f"test file; lm-eval {settings['lm_eval']}, torch {environment['torch']}, "
        f"transformers {environment['transformers']}. "
        "By length: log-likelihood divided by the characters of the choice (`acc_norm`). The last two columns: rows "
        "that one of the two counts as right and the other not, and the largest difference of two log-likelihoods."
    )
    command = (
        f"python -m eval.lm_eval.agreement --model {settings['model']} --data-dir D --dtype {settings['dtype']} "
        f"--test-rows {settings['test_rows']} --output results/lm_eval_agreement.json"
    )
    title = "# Zero-shot accuracy, beside lm-evaluation-harness"
    return "\n\n".join([title, about, table(result["tasks"]), "Made by", f"    {command}\n"])


def table(tasks: dict[str, dict]) -> str:
    """Return a row of both packages' figures for every task."""
    header = ["task", "rows", "accuracy", "lm-eval", "by length", "lm-eval", "rows that differ", "nats"]
    rows = []
    for task, found in tasks.items():
        figures = [f"{found[name]:.4f}" for name in COLUMNS]
        differences = [str(found["rows_judged_differently"]), f"{found['largest_difference_nats']:.1e}"]
        rows.append([task, str(found["rows"]), *figures, *differences])
    return markdown(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="local folder or hub id")
    parser.add_argument("--data-dir", required=True, help="folder with commonsense/TASK/test.jsonl.gz")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--test-rows", type=int, default=50)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--output", required=True, help="a JSON; the table is written beside it")
    arguments = parser.parse_args()
    settings = Training(model=arguments.model, dtype=arguments.dtype)
    known = settings_of(settings)
    saved = {name: known[name] for name in ("model", "dtype")}
    saved |= {"test_rows": arguments.test_rows, "lm_eval": lm_eval_version, "batch_size": BATCH_SIZE}
    tests = {task: load_rows(task, "test", arguments.data_dir) for task in arguments.tasks}
    tests = {task: rows.part(0, arguments.test_rows) for task, rows in tests.items()}
    data = {task: rows.record for task, rows in tests.items()}
    with recorded(arguments.output, "lm_eval_agreement", saved, data) as result:
        tokenizer, model = load_causal_lm(settings)
        model.eval()
        theirs = lm_eval_scores(model, tokenizer, arguments.tasks, arguments.data_dir, arguments.test_rows)
        result["tasks"] = {
            task: compare(our_scores(model, tokenizer, rows), theirs[task]) for task, rows in tests.items()
        }
    text = page(result)
    replace_file(f"{os.path.splitext(arguments.output)[0]}.md", text)
    print(text)


if __name__ == "__main__":
    main()
