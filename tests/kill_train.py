"""Train one adapter in processes that are killed at random moments: python kill_train.py FOLDER KILLS SEED

Writes FOLDER/kills.json: for every process, the checkpoint it resumed from and the newest that it left, partial or not.
"""

import json
import os
import random
import signal
import sys
import time

import torch
from test_trainer import make_trainer

from peft_scalora import last_complete_checkpoint

STEPS = 120


def train(folder):
    trainer = make_trainer(folder, max_steps=STEPS, save_steps=1, logging_steps=STEPS, save_total_limit=3)
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(folder))
    trainer.save_model(os.path.join(folder, "final"))
    torch.save(trainer.optimizer.optimizer.state_dict(), os.path.join(folder, "final", "optimizer.pt"))


def newest(folder):
    names = [name for name in os.listdir(folder) if name.startswith("checkpoint-")]
    return max(names, key=lambda name: int(name.split("-")[1]), default=None)


def in_child(folder, seconds=None):
    """Train in a copy of this process, killed that time after it has begun to write a checkpoint."""
    before = newest(folder) if os.path.isdir(folder) else None
    child = os.fork()
    if child == 0:
        status = 1
        try:
            train(folder)
            status = 0
        finally:
            os._exit(status)
    if seconds is not None:
        while newest(folder) == before:
            time.sleep(0.002)
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


def main():
    folder, kills, generator = sys.argv[1], int(sys.argv[2]), random.Random(int(sys.argv[3]))
    torch.set_num_threads(1)
    os.makedirs(folder)
    in_child(os.path.join(folder, "unbroken"))
    killed, log = os.path.join(folder, "killed"), []
    os.makedirs(killed)
    while len(log) < kills:
        start = last_complete_checkpoint(killed)
        status = in_child(killed, generator.uniform(0, 0.1))
        if os.WIFSIGNALED(status):
            log.append({"from": start and os.path.basename(start), "newest": newest(killed)})
        elif status:
            raise SystemExit(f"training failed after resuming from {start}")
        else:  # it was faster
            raise SystemExit(f"all {STEPS} steps were done after {len(log)} kills: train for longer")
    if in_child(killed):
        raise SystemExit("training failed after the last kill")
    with open(os.path.join(folder, "kills.json"), "w") as file:
        json.dump(log, file)


if __name__ == "__main__":
    main()
