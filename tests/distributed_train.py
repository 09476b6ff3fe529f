"""Run by torchrun: train adapters under engines, and beside each one on one process, on the same global batches.

    torchrun --nproc_per_node 2 distributed_train.py FOLDER RUNS

RUNS is JSON, settings by name: engine, accumulate, clip, and to break a run in two the steps first and last, the
checkpoint to load and the one to save. Rank 0 saves FOLDER/NAME.pt: the adapter of every rank, and that of the single
process, as whole tensors, and what it would send as plain LoRA.
"""

import copy
import json
import os
import sys

import torch
import torch.distributed as dist
from peft import get_peft_model
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from peft_scalora import ScaLoRAConfig, lora_state_dict

STEPS, BATCH, RATE = 30, 8, 1e-2


def make_model(seed):
    """An adapter of the rank's own, as scripts without a seed make it."""
    torch.manual_seed(7)
    base = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 8))
    torch.manual_seed(seed)
    # r = 3 does not divide by two ranks.
    return get_peft_model(
        base, ScaLoRAConfig(target_modules=["0", "2"], r=3, scaling="column", scaling_interval=3, accumulator_rank=7)
    )


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def batches(settings):
    """The micro-batches of every step from `first` to before `last`."""
    generator, accumulate = torch.Generator().manual_seed(1), settings["accumulate"]
    for step in range(settings["last"]):
        x, y = torch.randn(BATCH, 16, generator=generator), torch.randn(BATCH, 8, generator=generator)
        if step >= settings["first"]:
            yield list(zip(x.chunk(accumulate), y.chunk(accumulate)))


def loss_of(model, x, y):
    return (model(x) - y).square().mean()


def mine(tensor):
    return tensor.chunk(dist.get_world_size())[dist.get_rank()]


def train(model, wrapped, settings, share=mine):
    """The usual loop: accumulation, clipping, step."""
    optimizer = torch.optim.AdamW(trainable(model), lr=RATE)
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    if settings.get("load"):
        saved = torch.load(settings["load"])
        set_state_dict(
            model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"], options=whole
        )
    for micro_batches in batches(settings):
        for i, (x, y) in enumerate(micro_batches):
            last = i == settings["accumulate"] - 1
            if hasattr(wrapped, "set_requires_gradient_sync"):
                wrapped.set_requires_gradient_sync(last)
            (loss_of(wrapped, share(x), share(y)) / settings["accumulate"]).backward()
        if settings["clip"]:
            nn.utils.clip_grad_norm_(trainable(model), settings["clip"])
        optimizer.step()
        optimizer.zero_grad()
    if settings.get("save"):
        held_model, held_optimizer = get_state_dict(model, optimizer, options=whole)
        if dist.get_rank() == 0:
            torch.save({"model": held_model, "optimizer": held_optimizer}, settings["save"])


def train_deepspeed(model, stage, settings):
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": BATCH // settings["accumulate"] // dist.get_world_size(),
        "gradient_accumulation_steps": settings["accumulate"],
        "gradient_clipping": settings["clip"],
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.AdamW(trainable(model), lr=RATE)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    if settings.get("load"):
        engine.load_checkpoint(settings["load"])
    for micro_batches in batches(settings):
        for x, y in micro_batches:
            engine.backward(loss_of(engine, mine(x), mine(y)))
            engine.step()
    if settings.get("save"):
        engine.save_checkpoint(settings["save"])


def whole_state(model, stage):
    from peft_scalora.layer import ScaLoRALayer

    if stage == 3:
        import deepspeed

        with deepspeed.zero.GatheredParameters(trainable(model)):
            return copy.deepcopy({n: t for n, t in model.state_dict().items() if "lora" in n})
    assert any(isinstance(m, ScaLoRALayer) for m in model.modules())
    state = {n: t for n, t in model.state_dict().items() if "lora" in n}
    return {n: (t.full_tensor() if hasattr(t, "full_tensor") else t).clone() for n, t in state.items()}


def run(settings):
    """Return the adapter of every rank, and of one process alone."""
    engine = settings["engine"]
    stage = int(engine[-1]) if engine.startswith("zero") else None
    # FSDP2 shards what each rank has, all others begin with what rank 0 has.
    model, single = make_model(seed=0 if engine == "fsdp2" else dist.get_rank()), make_model(seed=0)
    if engine == "ddp":
        train(model, nn.parallel.DistributedDataParallel(model), settings)
    elif engine == "fsdp2":
        from torch.distributed.fsdp import fully_shard

        train(model, fully_shard(model), settings)
    else:
        train_deepspeed(model, stage, settings)
    states = [None] * dist.get_world_size()
    dist.all_gather_object(states, whole_state(model, stage))
    sent = lora_state_dict(model)  # by all ranks
    unbroken = {"accumulate": settings["accumulate"], "clip": settings["clip"], "first": 0, "last": settings["last"]}
    train(single, single, unbroken, share=lambda tensor: tensor)
    return {"states": states, "single": whole_state(single, None), "sent": sent}


def main():
    folder, runs = sys.argv[1], json.loads(sys.argv[2])
    torch.set_num_threads(1)
    if any(settings["engine"].startswith("zero") for settings in runs.values()):
        import deepspeed

        deepspeed.init_distributed("gloo")
    else:
        dist.init_process_group("gloo")
    for name, settings in runs.items():
        result = run({"accumulate": 1, "clip": 0.0, "first": 0, "last": STEPS} | settings)
        if dist.get_rank() == 0:
            torch.save(result, os.path.join(folder, f"{name}.pt"))
        dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # DeepSpeed's threads sometimes abort a process that ends in the usual way


if __name__ == "__main__":
    main()
