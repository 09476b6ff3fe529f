"""Tasks for lm-evaluation-harness over the files, prompts and answers of eval/commonsense.py.

python -m eval.lm_eval.tasks FOLDER --data-dir D
lm_eval --model hf --model_args pretrained=M --include_path FOLDER --tasks llm_adapters --limit 60
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

import yaml

from eval.tasks.commonsense import OUTPUT, TASKS, TEMPLATE
from peft_scalora.files.atomic import replace_file

GROUP = "llm_adapters"
# A list in Python's notation, which lm-eval evaluates.
CHOICES = """['OUTPUT{{ instruction.split("Answer format:")[-1].strip().split("/") | join("', 'OUTPUT") }}']"""


def task_name(task: str) -> str:
    return f"{GROUP}_{task.lower().replace('-', '_')}"


def task_config(task: str, path: str) -> dict:
    """Return a task in lm-eval's terms, of a JSONL file's rows: it writes prompts and choices by the template."""
    return {
        "task": task_name(task),
        "tag": GROUP,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": path}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": TEMPLATE.format(instruction="{{instruction}}"),
        "doc_to_choice": CHOICES.replace("OUTPUT", OUTPUT),
        "doc_to_target": "output",
        "target_delimiter": "",
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")
        ],
        "metadata": {"version": 1},
    }


def write_tasks(folder: str, data_dir: str, tasks: Sequence[str] = tuple(TASKS)) -> list[str]:
    """Write one YAML file a task to `folder`, and return the tasks' names."""
    os.makedirs(folder, exist_ok=True)
    for task in tasks:
        path = os.path.abspath(os.path.join(data_dir, "commonsense", task, "test.jsonl.gz"))
        if not os.path.exists(path):
            raise FileNotFoundError(f"{path} does not exist: --data-dir is the folder that eval/commonsense.py reads.")
        text = yaml.safe_dump(task_config(task, path), sort_keys=False)
        replace_file(os.path.join(folder, f"{task_name(task)}.yaml"), text)
    return [task_name(task) for task in tasks]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--data-dir", required=True)
    arguments = parser.parse_args()
    print("\n".join(write_tasks(arguments.folder, arguments.data_dir)))


if __name__ == "__main__":
    main()
