"""Greedy generation for many prompts: batched, left-padded, spread over processes, kept as it comes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from glob import escape, glob

import torch
from tqdm.auto import tqdm
from transformers import StoppingCriteriaList

from peft_scalora.files.atomic import replace_file

from .ranks import over_ranks
from .record import is_main_process

# Given, since a model's generation_config may say otherwise, as it often does of sampling and repetition.
GREEDY = {
    "do_sample": False,
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
}


def generate(
    model: torch.nn.Module,
    tokenizer,
    prompts: Sequence[str],
    max_new_tokens: int,
    batch_size: int = 16,
    stop: tuple[str, ...] = (),
    folder: str | None = None,
) -> list[str]:
    """Return the most likely continuation of every prompt, token by token, up to EOS or a `stop` string.

    Every process has to call it with the same prompts. With a `folder`, texts are written there batch by batch, and
    those of an interrupted call with the same model and arguments are read from there.

    Raises:
        ValueError: the tokenizer has no pad token.
    """
    if tokenizer.pad_token_id is None:
        raise ValueError("the tokenizer has no pad token: set one, such as tokenizer.pad_token = tokenizer.eos_token.")
    known = {} if folder is None else _read(folder)

    def share(prompts: Sequence[str]) -> list[str]:
        # The longest first: what does not fit into memory fails at once, and batches have little padding.
        missing = sorted({p for p in prompts if p not in known}, key=lambda p: (-len(tokenizer(p)["input_ids"]), p))
        with tqdm(total=len(missing), desc="generating", unit="row", disable=not is_main_process()) as progress:
            for start in range(0, len(missing), batch_size):
                batch = missing[start : start + batch_size]
                texts = dict(zip(batch, _generate_batch(model, tokenizer, batch, max_new_tokens, stop)))
                known.update(texts)
                if folder is not None:
                    _write(folder, texts)
                progress.update(len(batch))
        return [known[prompt] for prompt in prompts]

    was_training = model.training
    model.eval()
    try:
        return over_ranks(share, prompts)
    finally:
        model.train(was_training)


def _generate_batch(model, tokenizer, prompts: list[str], max_new_tokens: int, stop: tuple[str, ...]) -> list[str]:
    inputs = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
    ends = _end_tokens(model, tokenizer)

    def texts_of(ids: torch.Tensor) -> list[str]:
        return [_text(tokenizer, tokens, ends) for tokens in ids[:, inputs["input_ids"].shape[1] :].tolist()]

    def has_stop(ids: torch.Tensor, scores) -> torch.Tensor:
        return torch.tensor([any(s in text for s in stop) for text in texts_of(ids)], device=ids.device)

    outputs = model.generate(
        input_ids=inputs["input_ids"].to(model.device),
        attention_mask=inputs["attention_mask"].to(model.device),
        max_new_tokens=max_new_tokens,
        **GREEDY,
        use_cache=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=sorted(ends),
        stopping_criteria=StoppingCriteriaList([has_stop] if stop else []),
    )
    return [text[: min((text.index(s) for s in stop if s in text), default=len(text))] for text in texts_of(outputs)]


def _end_tokens(model, tokenizer) -> set[int]:
    of_model = model.generation_config.eos_token_id
    found = {tokenizer.eos_token_id, *(of_model if isinstance(of_model, list) else [of_model])}
    return found - {None}


def _text(tokenizer, tokens: list[int], ends: set[int]) -> str:
    end = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    return tokenizer.decode(tokens[:end], skip_special_tokens=True)


def _write(folder: str, texts: dict[str, str]) -> None:
    os.makedirs(folder, exist_ok=True)
    name = hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]
    replace_file(os.path.join(folder, f"generated-{name}.json"), json.dumps(texts))


def _read(folder: str) -> dict[str, str]:
    """Return the texts that all processes wrote."""
    known = {}
    for path in glob(os.path.join(escape(folder), "generated-*.json")):
        with open(path, encoding="utf-8") as file:
            known |= json.load(file)
    return known
