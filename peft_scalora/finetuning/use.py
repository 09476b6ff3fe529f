"""Using a finished run: evaluating it on other rows, and generating with it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence

import torch
from peft import PeftModel
from transformers import AutoTokenizer

from ..files.checkpoints import METRICS_NAME
from .data import Fields, check_labels, check_rows, encode_counting, prompt_text
from .models import load_base
from .quiet import quiet
from .settings import CAUSAL_LM, FinetuneSettings
from .sources import load_rows
from .training import make_recording_trainer

_TIMINGS = ("_runtime", "_per_second")


def load_run(folder: str) -> tuple[FinetuneSettings, dict]:
    """Return the settings and the metrics of a finished run.

    Raises:
        ValueError: the folder holds none.
    """
    path = os.path.join(folder, METRICS_NAME)
    try:
        with open(path, encoding="utf-8") as file:
            metrics = json.load(file)
        settings = FinetuneSettings.of(metrics["settings"] | {"output": folder}, path)
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder!r} holds no finished run of peft-scalora finetune ({error!r}).") from error
    return settings, metrics


def evaluate_run(folder: str, data: str) -> dict[str, float]:
    """Return loss and metrics of a finished run on all rows of other data.

    Raises:
        ValueError: the folder holds no finished run, or the rows are not like those that it was trained on.
    """
    settings, metrics = load_run(folder)
    fields = _fields_of(metrics, folder)
    rows = load_rows(data, "test")
    check_rows(rows, fields, data)
    if fields.label:
        check_labels(rows, fields.label, metrics["labels"], data)
    model, tokenizer = _load_adapted(folder, settings, metrics["labels"])
    with quiet():
        encoded, lengths = encode_counting(
            rows, tokenizer, settings.task, fields, settings.max_length, metrics["labels"]
        )
        trainer = make_recording_trainer(settings, model, tokenizer, None, encoded)
    results = trainer.evaluate()
    kept = {name: value for name, value in results.items() if not name.endswith(_TIMINGS)}
    return kept | {f"eval_{name}": value for name, value in vars(lengths).items()}


def generate_answers(
    folder: str, prompts: Sequence[str], max_new_tokens: int = 128, temperature: float = 0.0
) -> Iterator[str]:
    """Yield the continuation of each prompt; a run on conversations takes it as a user's message.

    Raises:
        ValueError: the folder holds no finished run of a language model.
    """
    settings, metrics = load_run(folder)
    if settings.task != CAUSAL_LM:
        raise ValueError(f"{folder!r} holds a run of task={settings.task!r}, which generates no text.")
    fields = _fields_of(metrics, folder)
    model, tokenizer = _load_adapted(folder, settings, None)
    sampling = {"do_sample": temperature > 0} | ({"temperature": temperature} if temperature > 0 else {})
    for prompt in prompts:
        ids = torch.tensor([_prompt_ids(prompt, tokenizer, fields, metrics["is_chat"])], device=model.device)
        with torch.inference_mode():
            output = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                pad_token_id=tokenizer.pad_token_id,
                **sampling,
            )
        yield tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


def _fields_of(metrics: dict, folder: str) -> Fields:
    if "fields" not in metrics:
        raise ValueError(f"{folder!r} holds a run of an older version, which does not say how it read its rows.")
    return Fields(**metrics["fields"] | {"text": tuple(metrics["fields"]["text"])})


def _load_adapted(folder: str, settings: FinetuneSettings, labels: list | None):
    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        base, _ = load_base(settings, labels)
        model = PeftModel.from_pretrained(base, folder).eval()
    if settings.task != CAUSAL_LM:
        model.config.pad_token_id = tokenizer.pad_token_id
    if torch.cuda.is_available() and not settings.load_in_4bit:
        model.to("cuda")
    return model, tokenizer


def _prompt_ids(prompt: str, tokenizer, fields: Fields, is_chat: bool) -> list[int]:
    if is_chat:
        messages = [{"role": "user", "content": prompt}]
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    if fields.completion:
        prompt = prompt_text({fields.prompt: prompt}, fields)
    return tokenizer(prompt)["input_ids"]
