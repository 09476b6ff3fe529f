"""Prompt and answer as token ids, with labels on the answer alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from peft_scalora.finetuning.data import IGNORED_LABEL


def with_labels(
    context: Sequence[int], answer: Sequence[int], tokenizer, max_length: int | None = None
) -> dict[str, list[int]] | None:
    """`input_ids`, `attention_mask` and `labels` of context, answer and EOS; the context's tokens have no label.

    None if there are more tokens than `max_length`: an answer that is cut would teach to stop anywhere.
    """
    answer = [*answer, tokenizer.eos_token_id]
    ids = [*context, *answer]
    if max_length is not None and len(ids) > max_length:
        return None
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [IGNORED_LABEL] * len(context) + answer}


def encode(prompt: str, answer: str, tokenizer, max_length: int | None = None) -> dict[str, list[int]] | None:
    """`with_labels` of the two, tokenized apart: the prompt's tokens are those that generation starts from."""
    prompt_ids = tokenizer(prompt)["input_ids"]
    answer_ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
    return with_labels(prompt_ids, answer_ids, tokenizer, max_length)


def encode_all(
    pairs: Iterable[tuple[str, str]], tokenizer, max_length: int | None = None
) -> tuple[list[dict[str, list[int]]], int]:
    """Every (prompt, answer) that is not too long, encoded, and the number of those that are."""
    encoded = [encode(prompt, answer, tokenizer, max_length) for prompt, answer in pairs]
    kept = [row for row in encoded if row is not None]
    return kept, len(encoded) - len(kept)
