"""Trainer runs with Gauss-Newton on a tiny language model."""

import torch
from datasets import Dataset
from helpers_runs import language_model
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from peft_scalora import GaussNewtonCallback, GaussNewtonConfig, ScaLoRAConfig

ADAPTER = {"r": 2, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "init_lora_weights": True}
ADAPTERS = {
    "lora": LoraConfig(**ADAPTER),
    "scalora": ScaLoRAConfig(**ADAPTER, scaling="column", scaling_interval=1, accumulator_rank=5),
    "full": None,
}


def make_model(adapter="lora"):
    model = language_model()
    return get_peft_model(model, ADAPTERS[adapter]) if ADAPTERS[adapter] else model


def token_rows(count=64):
    """Rows whose next token follows from the last, so that there is something to learn; some labels are ignored."""
    starts = torch.arange(count) % 12
    ids = 5 + (starts[:, None] + torch.arange(8) * (1 + starts[:, None] % 3)) % 12
    labels = torch.where(torch.arange(8) < 2, -100, ids)
    return Dataset.from_list([{"input_ids": i, "labels": j} for i, j in zip(ids.tolist(), labels.tolist())])


def make_trainer(folder, config=None, adapter="lora", callbacks=(), loss=None, model=None, **arguments):
    """`config` are fields of GaussNewtonConfig; False trains as without the callback."""
    settings = dict(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        max_steps=15,
        learning_rate=2e-2,
        save_strategy="no",
        logging_steps=5,
        report_to="none",
        use_cpu=True,
        seed=1,
        disable_tqdm=True,
    )
    if config is not False:
        callbacks = [GaussNewtonCallback(GaussNewtonConfig(**{"inner_steps": 4} | (config or {})), loss), *callbacks]
    return Trainer(
        model=model or make_model(adapter),
        args=TrainingArguments(**settings | arguments),
        train_dataset=token_rows(),
        eval_dataset=token_rows(8),
        callbacks=list(callbacks),
    )


def trainable(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


class Gradients(TrainerCallback):
    """The gradients of every optimizer step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad})
