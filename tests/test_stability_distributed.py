"""StabilityCallback in two data-parallel processes: the norm of the global batch, as one process has it."""

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
with open(f"{sys.argv[2]}/rank{trainer.args.process_index}.json", "w") as file:
    json.dump(callback.monitor.state_dict(), file)
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
    subprocess.run(command, check=True, capture_output=True, timeout=300, env=environment)
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    for column in ("norms", "thresholds", "group_norms", "steps"):
        assert ranks[0][column] == ranks[1][column]
    assert ranks[0]["norms"] == pytest.approx(single["norms"], rel=1e-4)
    assert ranks[0]["thresholds"][2:] == pytest.approx(single["thresholds"][2:], rel=1e-4)
    for name, norms in single["group_norms"].items():
        assert ranks[0]["group_norms"][name] == pytest.approx(norms, rel=1e-3)
