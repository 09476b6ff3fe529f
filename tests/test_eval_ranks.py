"""The harness on two processes: the shares of a list, and a whole run against the same on one process."""

import json
import os
import subprocess
import sys

import pytest
from helpers_runs import NO_DROPOUT, classification_rows, save_classifier
from test_eval_glue import write_task

from eval import glue
from eval.harness.ranks import over_ranks

SHARES = """
import json, os, sys
import torch.distributed as dist
from eval.harness.ranks import over_ranks
dist.init_process_group("gloo")
found = [over_ranks(lambda items: [(10 * i, dist.get_rank()) for i in items], list(range(n))) for n in (0, 1, 5, 6)]
with open(f"{sys.argv[1]}-{dist.get_rank()}.json", "w") as file:
    json.dump(found, file)
dist.barrier()
dist.destroy_process_group()
os._exit(0)  # DeepSpeed's threads sometimes abort a process that ends in the usual way
"""


def two_processes(*command, result):
    """Run `command` on two processes; the file that it leaves tells success: its threads may abort it after the end."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    environment = {"ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, *map(str, command)], env=os.environ | environment, capture_output=True, text=True)
    assert result.exists(), done.stderr[-3000:]


def test_one_process_computes_all():
    assert over_ranks(lambda items: [10 * i for i in items], [3, 1]) == [30, 10]


def test_every_process_has_all_results_in_order_and_computed_its_share(tmp_path):
    script = tmp_path / "shares.py"
    script.write_text(SHARES)
    two_processes(script, tmp_path / "found", result=tmp_path / "found-1.json")
    first, second = (json.loads((tmp_path / f"found-{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert [[value for value, _ in found] for found in first] == [[10 * i for i in range(n)] for n in (0, 1, 5, 6)]
    assert [rank for _, rank in first[2]] == [0, 0, 0, 1, 1]


def test_a_run_is_that_of_one_process_with_twice_the_batch(tmp_path, monkeypatch):
    data = write_task(tmp_path, "cola", classification_rows(60))
    model = save_classifier(tmp_path / "model", **NO_DROPOUT)
    options = "--task cola --method scalora --rank 2 --steps 5 --scaling-interval 2 --learning-rate 1e-2"
    options += " --warmup-steps 0 --eval-steps 3 --dev-rows 11"
    arguments = ["--model", model, "--data-dir", data, *options.split(), "--batch-size"]
    two_processes("-m", "eval.glue", *arguments, "4", "--output", tmp_path / "two.json", result=tmp_path / "two.json")
    monkeypatch.setattr(sys, "argv", ["x", *arguments, "8", "--output", str(tmp_path / "one.json")])
    glue.main()
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert two["status"] == "finished" and two["environment"]["processes"] == 2 and len(two["losses"]) == 5
    for (_, _, left), (_, _, right) in zip(one["losses"], two["losses"]):
        assert left == pytest.approx(right, rel=1e-5)
    assert one["predictions"] == two["predictions"] and len(set(two["predictions"])) == 2
    assert [p["matthews"] for p in one["curve"]] == pytest.approx([p["matthews"] for p in two["curve"]])
    assert one["data"] == two["data"] and glue.TASKS["cola"].metric == two["metric"]
