"""Gradient norms and clipping in two processes: those of the global batch, as one process has them."""

import json
import os
import subprocess
import sys

import pytest
from helpers_stability import make_trainer

from peft_scalora import StabilityCallback, StabilityConfig

SETTINGS = {"max_steps": 6, "gradient_accumulation_steps": 2}
SCRIPT = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from helpers_stability import make_trainer
from peft_scalora import StabilityCallback, StabilityConfig

callback = StabilityCallback(StabilityConfig(percentile=50, burn_in=2, plot=False))
trainer = make_trainer(sys.argv[2], [callback], per_device_train_batch_size=2, **json.loads(sys.argv[3]))
trainer.train()
rank = trainer.args.process_index

import copy
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from peft_scalora.stability import StabilityMonitor
torch.manual_seed(0)
whole = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3))
sharded = fully_shard(copy.deepcopy(whole), mesh=init_device_mesh("cpu", (2,)))
x, figures = torch.randn(8, 6), {}
for name, model, rows in (("whole", whole, x), ("sharded", sharded, x[4 * rank : 4 * rank + 4])):
    monitor = StabilityMonitor(StabilityConfig(calibration=[0.01], plot=False))
    model(rows).square().mean().backward()
    figures[name] = [monitor.clip(model), monitor.clip(model), monitor.group_norms]

with open(f"{sys.argv[2]}/rank{rank}.json", "w") as file:
    json.dump(callback.monitor.state_dict() | {"fsdp": figures}, file)
"""


def test_two_ranks_record_and_clip_what_one_process_does(tmp_path):
    callback = StabilityCallback(StabilityConfig(percentile=50, burn_in=2, plot=False))
    make_trainer(tmp_path / "single", [callback], per_device_train_batch_size=4, **SETTINGS).train()
    single = callback.monitor.state_dict()

    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    command += [os.path.dirname(__file__), str(tmp_path), json.dumps(SETTINGS)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    subprocess.run(command, check=True, capture_output=True, env=environment)
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    for column in ("norms", "thresholds", "group_norms", "steps"):
        assert ranks[0][column] == ranks[1][column]
    assert ranks[0]["norms"] == pytest.approx(single["norms"], rel=1e-4)
    assert ranks[0]["thresholds"][2:] == pytest.approx(single["thresholds"][2:], rel=1e-4)
    for name, norms in single["group_norms"].items():
        assert ranks[0]["group_norms"][name] == pytest.approx(norms, rel=1e-3)
    for figures in (rank["fsdp"] for rank in ranks):  # parameters sharded with FSDP 2
        (norm, clipped, groups), (sharded_norm, sharded_clipped, sharded_groups) = figures.values()
        assert sharded_norm == pytest.approx(norm, rel=1e-5)
        assert sharded_clipped == pytest.approx(clipped, rel=1e-5) == pytest.approx(0.01, rel=1e-3)
        assert sharded_groups.keys() == groups.keys()
        assert sharded_groups["0"] == pytest.approx(groups["0"], rel=1e-5)
