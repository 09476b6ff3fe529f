"""What all methods share: the model they start from, fine-tuning, saving, loading, and counting."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel, Trainer, set_seed

from eval import glue
from eval.baselines.mora import HEADS
from eval.harness.record import clock
from eval.harness.training import DTYPES, Training, train
from peft_scalora.layer import ScaLoRALayer
from peft_scalora.quantized import dequantized

from . import shrink
from .tasks import Task

BASE, ADAPTER = "base", "adapter"


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        caveat: what a user has to know before choosing it.
        after: the row whose saved model it starts from; None for the pretrained model.
        options: settings of the method, as it likes.
    """

    caveat: str
    after: str | None = "dense"
    options: dict = field(default_factory=dict)


@dataclass
class Context:
    """What a method works with.

    Attributes:
        training: of adapters; `full_learning_rate` is for what trains all weights.
        folders: row name -> folder of the saved model, for the rows that came before.
        loaders: row name -> the function that loads it.
        figures: what the method wants to have in the run's JSON, besides what is measured of every row.
        earlier_seconds: of the row's work, those that processes before this one have done and kept.
    """

    task: Task
    training: Training
    full_learning_rate: float
    folders: dict[str, str]
    loaders: dict
    scratch: str
    search_trials: int = 6
    figures: dict = field(default_factory=dict)
    earlier_seconds: float = 0.0

    def base(self, row: Row) -> nn.Module:
        """Return the model that `row` starts from, in evaluation mode."""
        if row.after is None:
            set_seed(self.training.seed)  # of a head that is drawn
            return self.task.fresh(DTYPES[self.training.dtype]).eval()
        return self.loaders[row.after](self.folders[row.after])

    def fine_tune(
        self,
        model: nn.Module,
        method: str,
        trainer_class: Callable[..., Trainer] = Trainer,
        checkpoints: str = "checkpoints",
        **changes,
    ) -> nn.Module:
        """Train `model` on the task by "full", "lora" or "scalora"; for adapters, return the model with the adapter.

        A classifier's head is float32 then. `checkpoints` is a folder in `scratch`, from which an interrupted training
        goes on; `changes` are to fields of `training`.
        """
        if method == "full":
            changes = {"learning_rate": self.full_learning_rate} | changes
        settings = replace(self.training, method=method, **changes)
        folder, started = os.path.join(self.scratch, checkpoints), clock()
        model, figures = train(
            settings,
            glue.head_in(torch.float32, model),
            self.task.train,
            self.task.collator,
            lambda _: {},
            folder,
            trainer_class,
        )
        self.earlier_seconds += max(0.0, figures["train_seconds"] - (clock() - started))
        last = [loss for *_, loss in figures["losses"][-10:]]
        self.figures["mean_of_last_losses"] = sum(last) / len(last)
        self.figures |= {name: figures[name] for name in ("trainable_parameters", "effective_rank", "steps", "tokens")}
        return model.eval()

    def recover(self, model: nn.Module, method: str = "scalora") -> nn.Module:
        """Return `model` after ScaLoRA, merged: as large as before, and the head in the type of the others."""
        model = self.fine_tune(model, method).merge_and_unload()
        return glue.head_in(model.dtype, model).eval()


def save(model: PreTrainedModel, folder: str) -> None:
    model.save_pretrained(folder)


def load(folder: str, **options) -> PreTrainedModel:
    """Return the model that `save` wrote, of the class and dtype that it had; `options` go to from_pretrained.

    Raises:
        ValueError: options for a model that transformers cannot load by itself.
    """
    config = AutoConfig.from_pretrained(folder)
    cls = getattr(transformers, config.architectures[0])
    if not shrink.needs_own_loading(config):
        return cls.from_pretrained(folder, **{"dtype": "auto"} | options).eval()
    if options:
        raise ValueError(f"{folder}: a model with heads taken out takes no {', '.join(options)}.")
    return shrink.filled(shrink.construct(cls, config), load_file(os.path.join(folder, "model.safetensors")))


def on_device(model: nn.Module) -> nn.Module:
    """Return `model` where it is scored and measured: on the GPU, if there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model if model.device.type == device else model.to(device)


def save_adapter(model: PeftModel, folder: str) -> None:
    model.save_pretrained(os.path.join(folder, ADAPTER))


def load_adapter(folder: str, base: PreTrainedModel) -> PeftModel:
    return PeftModel.from_pretrained(glue.head_in(torch.float32, base), os.path.join(folder, ADAPTER)).eval()


def bytes_on_disk(folder: str) -> int:
    """Return the bytes of all weights below the folder."""
    return sum(os.path.getsize(path) for path in glob.glob(f"{folder}/**/*.safetensors", recursive=True))


def count(model: nn.Module) -> dict[str, int]:
    """Count parameters and non-zero ones; of a quantized weight, its values. Shared weights count once."""
    parameters = nonzeros = 0
    seen = set()
    for module in model.modules():
        for values in _values(module, seen):
            parameters += values.numel()
            nonzeros += int(torch.count_nonzero(values))
    return {"parameters": parameters, "nonzeros": nonzeros}


def _values(module: nn.Module, seen: set) -> list[Tensor]:
    own = dict(module.named_parameters(recurse=False))
    if isinstance(module, ScaLoRALayer):
        for adapter in module.scalora_config:
            own |= {f"{name} {adapter}": t for name, t in module.accumulator(adapter).tensors.items()}
    fresh = {name: p for name, p in own.items() if id(p) not in seen}
    seen |= {id(p) for p in fresh.values()}
    quantized = _quantized_values(module) if "weight" in fresh else None
    return [quantized if name == "weight" and quantized is not None else p.detach() for name, p in fresh.items()]


def _quantized_values(module: nn.Module) -> Tensor | None:
    weight = module.weight
    if type(weight).__name__ == "Int4OpaqueTensor":  # cannot unpack itself, only multiply
        identity = torch.eye(weight.shape[1], dtype=weight.dtype)
        return nn.functional.linear(identity, weight)
    return dequantized(module)


def linear_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def heads(model: PreTrainedModel) -> list[str]:
    """Return the linear layers that give the model's result: they stay as precise as they are."""
    output = model.get_output_embeddings()
    return [name for name, module in model.named_modules() if module is output or name.split(".")[-1] in HEADS]
