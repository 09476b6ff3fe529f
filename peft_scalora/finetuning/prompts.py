"""Prompt and answer as token ids, with labels on the answer alone. Needs nothing but a tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

IGNORED_LABEL = -100
Encoded = dict[str, list[int]]


def with_labels(
    prompt: Sequence[int], answer: Sequence[int], end: int, max_length: int | None = None
) -> Encoded | None:
    """Return `input_ids`, `attention_mask` and `labels` of prompt, answer and end; the prompt's tokens have no label.

    Args:
        prompt, answer: token ids.
        end: the id of EOS.
        max_length: tokens that a row may have, None for any number. A longer one is None: an answer that is cut would
            teach to stop anywhere.
    """
    ids = [*prompt, *answer, end]
    if max_length is not None and len(ids) > max_length:
        return None
    labels = [IGNORED_LABEL] * len(prompt) + [*answer, end]
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


def encode(prompt: str, answer: str, tokenizer, max_length: int | None = None) -> Encoded | None:
    """Return `with_labels` of the two, tokenized apart: the prompt's tokens are those that generation starts from."""
    prompt_ids = tokenizer(prompt)["input_ids"]
    answer_ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
    return with_labels(prompt_ids, answer_ids, tokenizer.eos_token_id, max_length)


def encode_all(pairs: Iterable[tuple[str, str]], tokenizer, max_length: int | None = None) -> tuple[list[Encoded], int]:
    """Return every (prompt, answer) that is not too long, encoded, and the number of those that are."""
    encoded = [encode(prompt, answer, tokenizer, max_length) for prompt, answer in pairs]
    kept = [row for row in encoded if row is not None]
    return kept, len(encoded) - len(kept)


def load_tokenizer(model: str):
    """Return the tokenizer of a model's folder or hub id; it pads with EOS where it has no token for that."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
