"""The settings of a fine-tuning run: names, defaults, help and checks. Imports nothing heavy: help must be fast."""

from __future__ import annotations

import json
import math
import os
from dataclasses import MISSING, Field, dataclass, field, fields
from difflib import get_close_matches

CAUSAL_LM = "causal-lm"
TASKS = (CAUSAL_LM, "classification", "regression")
METHODS = ("scalora", "lora")
_ALLOWED = {
    "1 or more": lambda value: value >= 1,
    "0 or more": lambda value: value >= 0,
    "above 0": lambda value: value > 0,
    "at least 0 and below 1": lambda value: 0 <= value < 1,
    "1 or more, or -1 to train for the epochs": lambda value: value == -1 or value >= 1,
    "above 0, or auto": lambda value: value == "auto" or value > 0,
}


def _setting(default=MISSING, help: str = "", allowed: str | tuple[str, ...] = "") -> Field:
    """Return a dataclass field with its help and what it may be: choices, or a condition of `_ALLOWED`."""
    return field(default=default, metadata={"help": help, "allowed": allowed})


@dataclass
class FinetuneSettings:
    """Settings that decide a run; they are saved with its results. Strings are converted to a setting's type.

    Raises:
        ValueError: names the setting, its value and what it may be.
    """

    model: str = _setting(help="a local folder or an id on the hub")
    data: str = _setting(
        help="rows to train on: a JSONL, JSON, CSV, TSV or Parquet file (also .gz), a folder of them, a pattern such "
        "as 'rows/*.jsonl', a saved dataset, or a dataset on the hub: name or name:config"
    )
    task: str = _setting(help="what is learned", allowed=TASKS)
    output: str = _setting(
        help="folder for adapter, metrics, plots and checkpoints; an interrupted run continues there"
    )
    method: str = _setting("scalora", "the adapter", METHODS)
    start_from: str | None = _setting(None, "adapter folder, LoRA or ScaLoRA, whose weights training starts from")
    eval_data: str | None = _setting(None, "held-out data; without it some rows of the data are held out")
    test_data: str | None = _setting(None, "data to report test_* metrics on, apart from what settings were chosen by")
    text_fields: tuple[str, ...] = _setting((), "comma-separated fields of the text (one, or a pair for classes)")
    label_field: str = _setting(
        "", "field of the label: strings or whole numbers for classes, fractions for regression"
    )
    prompt_field: str = _setting(
        "", "field of the prompt, which is not trained on; to an instruction its field input is added"
    )
    completion_field: str = _setting("", "field of the completion")
    messages_field: str = _setting("", "field of the chat messages, of which the assistant's are trained on")
    chat_template: str | None = _setting(None, "file with a Jinja chat template, for a model that has none")
    r: int = _setting(8, "rank of the adapter", "1 or more")
    lora_alpha: int = _setting(16, "scaling of the adapter: lora_alpha / r", "1 or more")
    lora_dropout: float = _setting(0.0, "dropout on the adapter's inputs", "at least 0 and below 1")
    target_modules: str = _setting("all-linear", "modules to adapt, comma-separated, or all-linear")
    scaling: str = _setting("shrink", "rule that columns are rescaled by", ("column", "scalar", "exact", "shrink"))
    scaling_interval: int = _setting(10, "optimizer steps from one rescaling to the next", "1 or more")
    smoothness: float | str = _setting("auto", "smoothness constant L, or auto", "above 0, or auto")
    accumulator_rank: int | None = _setting(None, "rank R of the accumulated change; 7 r unless given", "1 or more")
    learning_rate: float = _setting(2e-4, "peak learning rate", "above 0")
    lr_scheduler_type: str = _setting(
        "linear",
        "how the learning rate falls after the warmup",
        ("linear", "cosine", "polynomial", "inverse_sqrt", "constant", "constant_with_warmup"),
    )
    batch_size: int = _setting(8, "rows a batch, on each device", "1 or more")
    gradient_accumulation_steps: int = _setting(1, "batches an optimizer step", "1 or more")
    epochs: float = _setting(1.0, "passes over the data", "above 0")
    max_steps: int = _setting(
        -1, "stop after this many steps instead of after the epochs", "1 or more, or -1 to train for the epochs"
    )
    warmup_ratio: float = _setting(0.05, "share of the steps in which the rate rises", "at least 0 and below 1")
    weight_decay: float = _setting(0.0, "weight decay of the factors", "0 or more")
    max_length: int = _setting(512, "tokens a row; longer rows are cut", "1 or more")
    eval_rows: int = _setting(500, "rows to evaluate on, at most", "1 or more")
    eval_steps: int = _setting(0, "evaluate every so many steps too; 0: at the end only", "0 or more")
    early_stopping_patience: int = _setting(
        0, "stop after so many evaluations without a better loss, and keep the best; 0: never", "0 or more"
    )
    logging_steps: int = _setting(10, "steps from one log to the next", "1 or more")
    save_steps: int = _setting(200, "steps from one checkpoint to the next", "1 or more")
    report_to: str = _setting("none", "comma-separated trackers, such as wandb,tensorboard, or none")
    seed: int = _setting(0, "of weights and the order of rows", "0 or more")
    dtype: str = _setting(
        "auto", "of the base model's weights; auto: bfloat16 on a GPU", ("auto", "float32", "bfloat16")
    )
    bf16: bool = _setting(False, "the same as dtype bfloat16")
    load_in_4bit: bool = _setting(False, "quantize the base model to 4 bit (NF4, with bitsandbytes)")
    gradient_checkpointing: bool = _setting(False, "compute activations twice instead of keeping them")

    def __post_init__(self):
        for setting in fields(self):
            value = _converted(setting, getattr(self, setting.name))
            _check(setting, value)
            setattr(self, setting.name, value)
        if self.early_stopping_patience and not self.eval_steps:
            raise ValueError(
                f"early_stopping_patience={self.early_stopping_patience} needs evaluations: set eval_steps as well."
            )

    @classmethod
    def of(cls, values: dict, source: str = "the settings") -> FinetuneSettings:
        """Return the settings of a mapping from names to values.

        Raises:
            ValueError: a name is unknown, a value is missing, or not what the setting may be.
        """
        known = [setting.name for setting in fields(cls)]
        for name in values:
            if name not in known:
                close = get_close_matches(str(name), known, 1)
                raise ValueError(f"{source} has {name!r}, no setting of a run{suggestion(close)}.")
        missing = [s.name for s in fields(cls) if s.default is MISSING and values.get(s.name) is None]
        if missing:
            options = ", ".join(f"--{name.replace('_', '-')}" for name in missing)
            raise ValueError(f"{', '.join(missing)} missing: give {options}, or a file of settings that has them.")
        return cls(**values)


def suggestion(close: list[str]) -> str:
    """Return ": did you mean X?" for the first of some close matches, or nothing."""
    return f": did you mean {close[0]}?" if close else ""


def read_settings(path: str) -> dict:
    """Return the settings in a YAML or JSON file, which may be the settings.json of another run.

    Raises:
        ValueError, OSError: the file cannot be read, or holds no settings.
    """
    import yaml

    if os.path.isdir(path):
        raise ValueError(f"settings={path!r} is a folder: name a file, such as {os.path.join(path, 'settings.json')}.")
    try:
        with open(path, encoding="utf-8") as file:
            values = json.load(file) if path.lower().endswith(".json") else yaml.safe_load(file)
    except OSError as error:
        raise OSError(f"settings={path!r} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"settings={path!r} is neither YAML nor JSON: {' '.join(str(error).split())}.") from error
    if isinstance(values, dict) and isinstance(values.get("settings"), dict):
        values = values["settings"]  # as settings.json and metrics.json have them
    if not isinstance(values, dict):
        raise ValueError(f"settings={path!r} holds no settings: write lines such as 'learning_rate: 1e-4'.")
    return {str(name).replace("-", "_"): value for name, value in values.items()}


def _converted(setting: Field, value):
    """Return the value in the setting's type: a command line holds strings, and YAML takes 2e-4 for one."""
    kinds = [kind.strip() for kind in setting.type.split("|")]
    if value is None and setting.default is not MISSING:
        return setting.default
    if "tuple" in setting.type:
        return tuple(value.split(",")) if isinstance(value, str) else tuple(value)
    if "float" in kinds and value == "auto":
        return value
    for kind, convert in (("bool", _as_bool), ("int", _as_int), ("float", float), ("str", str)):
        if kind in kinds:
            try:
                return convert(value)
            except (TypeError, ValueError) as error:
                wanted = {"bool": "true or false", "int": "a whole number", "float": "a number"}[kind]
                also = " or auto" if "str" in kinds else ""
                raise ValueError(f"{setting.name}={value!r} must be {wanted}{also}.") from error
    raise TypeError(f"setting {setting.name} has the type {setting.type}, which no value is converted to.")


def _as_bool(value) -> bool:
    known = {"true": True, "yes": True, "false": False, "no": False}
    if str(value).lower() not in known:
        raise ValueError
    return known[str(value).lower()]


def _as_int(value) -> int:
    if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
        raise ValueError
    return int(value)


def _check(setting: Field, value) -> None:
    allowed = setting.metadata["allowed"]
    if not allowed or value is None:
        return
    if isinstance(allowed, tuple):
        if value not in allowed:
            raise ValueError(f"{setting.name}={value!r} must be one of {', '.join(allowed)}.")
        return
    finite = isinstance(value, str) or math.isfinite(value)
    if not finite or not _ALLOWED[allowed](value):
        raise ValueError(f"{setting.name}={value!r} must be {allowed}.")
