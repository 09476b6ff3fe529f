"""Gauss-Newton under Trainer on two gloo processes equals one process with twice the batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers_gauss_newton import make_trainer, trainable

INNER = ("adamw", "cg")
SCRIPT = """
import sys
sys.path[:0] = [sys.argv[1]]
import torch
import torch.distributed as dist
from test_gauss_newton_distributed import INNER, train

torch.set_num_threads(1)
results = {inner: train(sys.argv[2], inner, size=2) for inner in INNER}
everywhere = [None, None]
dist.all_gather_object(everywhere, results)
if dist.get_rank() == 0:
    torch.save(everywhere, sys.argv[2] + "/results.pt")
"""


def train(folder, inner, size):
    cg = inner == "cg"
    trainer = make_trainer(
        folder,
        {"inner_optimizer": inner, "inner_steps": 1 if cg else 3},
        adapter="scalora",
        per_device_train_batch_size=size,
        gradient_accumulation_steps=2,
        max_grad_norm=0.0 if cg else 1.0,
        max_steps=8,
    )
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "gauss_newton/loss" in entry]
    return trainable(trainer.model), log[-1]["gauss_newton/loss"] if log else None


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "train.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    result = subprocess.run(
        [*command, str(folder / "train.py"), str(Path(__file__).parent), str(folder)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return torch.load(folder / "results.pt")


@pytest.mark.parametrize("inner", INNER)
def test_two_ranks_equal_one_process_with_twice_the_batch(ranks, tmp_path, inner):
    (first, loss), (second, _) = (rank[inner] for rank in ranks)
    one, one_loss = train(tmp_path, inner, size=4)
    assert loss == pytest.approx(one_loss, rel=1e-4)
    for name, weight in one.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], weight, rtol=1e-2, atol=1e-4)
