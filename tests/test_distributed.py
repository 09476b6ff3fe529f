"""Data-parallel training on two gloo processes equals training on one."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from peft_scalora import ScaLoRAConfig, rescale

SCRIPT = """
import copy, sys
import torch
import torch.distributed as dist
from peft import get_peft_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from peft_scalora import ScaLoRAConfig

dist.init_process_group("gloo")
rank = dist.get_rank()
torch.set_num_threads(1)
torch.manual_seed(0)
base = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 8))
model = get_peft_model(base, ScaLoRAConfig(target_modules=["0", "2"], r=3, scaling_interval=3, accumulator_rank=7))
single = copy.deepcopy(model)
parallel = DistributedDataParallel(model)
optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-2) for m in (model, single)]
generator = torch.Generator().manual_seed(1)
for _ in range(30):
    x, y = torch.randn(8, 16, generator=generator), torch.randn(8, 8, generator=generator)
    mine = slice(4 * rank, 4 * rank + 4)
    (parallel(x[mine]) - y[mine]).square().mean().backward()
    (single(x) - y).square().mean().backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
states = [None, None]
dist.all_gather_object(states, model.state_dict())
if rank == 0:
    layers = dict(single.named_modules())
    changes = {
        name: (layer.get_delta_weight("default").detach(), layers[name].get_delta_weight("default").detach())
        for name, layer in model.named_modules() if hasattr(layer, "scalora_U")
    }
    torch.save({"states": states, "changes": changes}, sys.argv[1])
dist.destroy_process_group()
"""


def test_two_ranks_hold_the_same_bits_and_the_weights_of_one_process(tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(tmp_path / "train.py"), str(tmp_path / "result.pt")]
    subprocess.run(command, check=True, capture_output=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
    result = torch.load(tmp_path / "result.pt")
    first, second = result["states"]
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(tensor.tolist() == [30, 10, 7] for name, tensor in first.items() if "progress" in name)
    for parallel, single in result["changes"].values():
        assert float(torch.linalg.matrix_norm(parallel - single)) < 1e-5 * float(torch.linalg.matrix_norm(single))


def test_sharded_parameters_are_refused_by_name():
    from peft import get_peft_model

    class Sharded(nn.Parameter):
        def full_tensor(self):
            raise AssertionError("nothing may be read before the refusal")

    model = get_peft_model(nn.Sequential(nn.Linear(6, 5)), ScaLoRAConfig(target_modules=["0"], r=2))
    layer = model.base_model.model[0]
    for factor in (layer.lora_A["default"], layer.lora_B["default"]):
        factor.weight = Sharded(factor.weight.data)
        factor.weight.grad = torch.ones_like(factor.weight.data)
    with pytest.raises(TypeError, match="cannot rescale sharded parameters"):
        rescale(model)
