"""The example for many GPUs: its configurations are accelerate's, its script trains on two processes."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from helpers_runs import save_language_model, sentences
from safetensors.torch import load_file

from peft_scalora.rescaling.sharding import CHECK_RANKS

FOLDER = pathlib.Path(__file__).parents[1] / "examples" / "multi_gpu"


@pytest.mark.parametrize(
    "name, engine", [("ddp", "MULTI_GPU"), ("fsdp2", "FSDP"), ("zero2", "DEEPSPEED"), ("zero3", "DEEPSPEED")]
)
def test_configurations(name, engine):
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    assert (config.distributed_type, config.num_processes) == (engine, 2)
    if name == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2
    if name.startswith("zero"):
        assert config.deepspeed_config["zero_stage"] == int(name[-1])


def test_it_trains_on_two_processes(tmp_path):
    save_language_model(tmp_path / "model")
    rows = "\n".join(json.dumps({"text": text}) for text in sentences(64))
    (tmp_path / "train.jsonl").write_text(rows)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(FOLDER / "train.py"), "--model", str(tmp_path / "model"), "--data", str(tmp_path / "train.jsonl")]
    command += ["--rank", "2", "--steps", "6", "--scaling-interval", "2", "--output", str(tmp_path / "run")]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", CHECK_RANKS: "1"}
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stderr[-3000:]
    progress = {
        t.tolist()[:2] == [6, 3]
        for n, t in load_file(tmp_path / "run" / "adapter_model.safetensors").items()
        if "progress" in n
    }
    assert progress == {True}
