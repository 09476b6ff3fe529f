"""One fine-tuning run: LoRA or ScaLoRA, classification or causal language modelling. Needs the extra `finetune`."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass

from transformers import set_seed

from ..callbacks import ScaLoRACallback
from ..files.atomic import replace_file
from ..files.checkpoints import METRICS_NAME, last_complete_checkpoint
from ..files.fingerprint import fingerprint
from ..plots import plot_lines
from ..rank import effective_rank
from .data import Fields, Lengths, check_labels, check_rows, encode_counting, find_classes, find_fields, hold_out
from .models import adapted_model, adapter_bytes, adapter_config, load_tokenizer, trainable_parameters
from .output import claim_output, finished_metrics, is_main_process, refuse_foreign_files
from .quiet import quiet
from .settings import CAUSAL_LM, FinetuneSettings
from .sources import content_hash, load_rows
from .training import LogLines, NonFiniteLoss, StopOnNonFiniteLoss, classification_metrics, make_recording_trainer, say
from .verdict import judge

__all__ = [
    "FinetuneSettings",
    "NonFiniteLoss",
    "adapter_config",
    "classification_metrics",
    "finetune",
    "make_trainer",
]


@dataclass
class RunData:
    """Checked rows of a run by part: "train", "eval" and, where there are such rows, "test".

    Attributes:
        hashes: of the content of every source, by the name of its setting.
        classes: labels in the order of their numbers; None for regression and language modelling.
    """

    parts: dict
    fields: Fields
    classes: list | None
    hashes: dict[str, str]

    @property
    def is_chat(self) -> bool:
        """True where the rows are conversations, which go through the model's chat template."""
        first = self.parts["train"][0]
        return bool(self.fields.messages) or isinstance(first.get(self.fields.prompt), list)


def finetune(settings: FinetuneSettings) -> dict:
    """Run, or continue, the fine-tuning and return its metrics; everything lands below `settings.output`.

    Writes settings.json, the adapter with its model card, metrics.json, loss.png and scalora_rank.png. An interrupted
    run continues from its last checkpoint; a finished one returns its metrics, or trains on where `max_steps` or
    `epochs` have become more. Nothing is written before settings, data and model are known to fit.

    Raises:
        OSError: the output folder cannot be written to, or holds other files. ValueError: data or settings do not fit,
            or the folder holds a run with other settings, data or base model. NonFiniteLoss: the loss became nan.
    """
    refuse_foreign_files(settings.output)
    with quiet():
        data = load_data(settings)
    finished = finished_metrics(settings, data.hashes)
    if finished is not None:
        say(f"{settings.output} holds this run, finished, and its data are the same: nothing was trained.")
        return finished
    set_seed(settings.seed)
    with quiet():
        tokenizer = load_tokenizer(settings)
        model = adapted_model(settings, data.classes)
        encoded, lengths = _encode(settings, data, tokenizer, model)
    say(understood(settings, data, lengths))
    claim_output(settings, data.hashes, fingerprint(model, model.peft_config["default"].modules_to_save))
    trainer = make_recording_trainer(settings, model, tokenizer, encoded["train"], encoded["eval"])
    metrics = _train(settings, trainer, tokenizer, encoded.get("test"))
    metrics |= {"labels": data.classes, "data": {part: vars(each) for part, each in lengths.items()}}
    metrics |= {"data_hashes": data.hashes, "fields": asdict(data.fields), "is_chat": data.is_chat}
    metrics |= {"settings": asdict(settings)}
    metrics["log"] = trainer.state.log_history
    if is_main_process():
        _plot_loss(os.path.join(settings.output, "loss.png"), trainer.state.log_history)
        replace_file(os.path.join(settings.output, METRICS_NAME), json.dumps(metrics, indent=1, default=str))
    return metrics


def make_trainer(settings: FinetuneSettings):
    """Return the Trainer of a run with fresh weights, for searches: it logs nothing and does not stop by itself."""
    set_seed(settings.seed)
    with quiet():
        data = load_data(settings)
        tokenizer = load_tokenizer(settings)
        model = adapted_model(settings, data.classes)
        encoded, _ = _encode(settings, data, tokenizer, model)
    trainer = make_recording_trainer(settings, model, tokenizer, encoded["train"], encoded["eval"])
    for callback in (StopOnNonFiniteLoss, ScaLoRACallback, LogLines):
        trainer.remove_callback(callback)
    return trainer


def load_data(settings: FinetuneSettings) -> RunData:
    """Return the checked rows to train, evaluate and test on.

    Raises:
        ValueError, FileNotFoundError: name the source, and the row where it is one.
    """
    rows = load_rows(settings.data)
    fields = find_fields(rows.column_names, settings.task, given_fields(settings))
    check_rows(rows, fields, settings.data)
    classes = find_classes(rows, fields.label, settings.data) if settings.task == "classification" else None
    hashes = {"data": content_hash(rows)}
    parts = {"train": rows}
    for part, name, split in (("eval", "eval_data", "validation"), ("test", "test_data", "test")):
        source = getattr(settings, name)
        if source:
            parts[part] = _load_part(source, split, fields, classes)
            hashes[name] = content_hash(parts[part])
    if settings.task == "regression":
        check_labels(rows, fields.label, None, settings.data)
    if "eval" not in parts:
        parts["train"], parts["eval"] = hold_out(rows, settings.eval_rows, settings.data)
    parts["eval"] = parts["eval"].select(range(min(settings.eval_rows, len(parts["eval"]))))
    return RunData(parts, fields, classes, hashes)


def given_fields(settings: FinetuneSettings) -> Fields:
    return Fields(
        text=settings.text_fields,
        label=settings.label_field,
        prompt=settings.prompt_field,
        completion=settings.completion_field,
        messages=settings.messages_field,
    )


def _load_part(source: str, split: str, fields: Fields, classes: list | None):
    rows = load_rows(source, split)
    check_rows(rows, fields, source)
    if fields.label:
        check_labels(rows, fields.label, classes, source)
    return rows


def _encode(settings: FinetuneSettings, data: RunData, tokenizer, model) -> tuple[dict, dict[str, Lengths]]:
    """Return the encoded rows of every part, and what became of them at `max_length`."""
    if settings.task != CAUSAL_LM:
        model.config.pad_token_id = tokenizer.pad_token_id
    encoded = {}
    lengths = {}
    for part, rows in data.parts.items():
        encoded[part], lengths[part] = encode_counting(
            rows, tokenizer, settings.task, data.fields, settings.max_length, data.classes
        )
    return encoded, lengths


def understood(settings: FinetuneSettings, data: RunData, lengths: dict[str, Lengths]) -> str:
    """Return in one line what the data were taken for, and how many rows are used, left out and cut."""
    if settings.task == CAUSAL_LM:
        kind = f"text of {' and '.join(data.fields.required())}"
    elif data.classes is None:
        kind = f"regression on {data.fields.label}"
    else:
        named = ", ".join(map(str, data.classes[:5])) + (", ..." if len(data.classes) > 5 else "")
        kind = f"{len(data.classes)} classes: {named}"
    parts = [f"{lengths['train'].rows} rows to train", f"{lengths['eval'].rows} held out"]
    if "test" in lengths:
        parts.append(f"{lengths['test'].rows} to test")
    parts.append(f"{sum(each.left_out for each in lengths.values())} left out for length")
    parts.append(f"{sum(each.cut for each in lengths.values())} cut at {settings.max_length} tokens")
    return f"{kind}; {', '.join(parts)}"


def _train(settings: FinetuneSettings, trainer, tokenizer, test_rows) -> dict:
    """Train, evaluate and save; return the figures of it."""
    started = time.perf_counter()
    result = trainer.train(resume_from_checkpoint=last_complete_checkpoint(settings.output))
    metrics = {"train_loss": result.training_loss, "train_seconds": time.perf_counter() - started}
    metrics |= trainer.evaluate()
    if test_rows is not None:
        metrics |= trainer.evaluate(test_rows, metric_key_prefix="test")
    trainer.save_state()  # before the adapter, whose card reads the results there
    trainer.save_model(settings.output)
    tokenizer.save_pretrained(settings.output)
    trainer.accelerator.wait_for_everyone()
    ranks = effective_rank(trainer.model)
    metrics |= {
        "effective_rank": sum(ranks.values()) / len(ranks),
        "trainable_parameters": trainable_parameters(trainer.model),
        "checkpoint_bytes": adapter_bytes(settings.output),
        "median_seconds_per_step": trainer.median_seconds(),
        "steps": trainer.state.global_step,
        "stability": judge(trainer.losses(), trainer.state.log_history),
    }
    return metrics


def _plot_loss(path: str, log: list[dict]) -> None:
    points = [(entry["step"], entry["loss"]) for entry in log if "loss" in entry]
    if points:
        plot_lines(path, [("Training loss", "loss", {"training": tuple(zip(*points))})])
