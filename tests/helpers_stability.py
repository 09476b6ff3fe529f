"""A tiny language model under Trainer, for the tests of the stability toolkit."""

import torch
from datasets import Dataset
from helpers_runs import language_model
from transformers import Trainer, TrainerCallback, TrainingArguments


def token_rows(count=64):
    ids = torch.randint(5, 17, (count, 8), generator=torch.Generator().manual_seed(0)).tolist()
    return Dataset.from_list([{"input_ids": row, "labels": row} for row in ids])


def make_trainer(folder, callbacks=(), model=None, eval_rows=0, **arguments):
    settings = dict(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        max_steps=20,
        learning_rate=5e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        seed=1,
        disable_tqdm=True,
    )
    return Trainer(
        model=language_model() if model is None else model,
        args=TrainingArguments(**settings | arguments),
        train_dataset=token_rows(),
        eval_dataset=token_rows(eval_rows) if eval_rows else None,
        callbacks=list(callbacks),
    )


class GradientRecorder(TrainerCallback):
    """Copies of all gradients just before every optimizer step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None})
