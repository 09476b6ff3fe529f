"""Prompt and answer as token ids: on which tokens a model's own loss is, and what becomes of long rows."""

import pytest
import torch
from helpers_models import tiny_llama

from peft_scalora.finetuning.prompts import encode_all, with_labels

PROMPT, ANSWER, END = [5, 6, 7], [8, 9], 1


def test_the_models_loss_is_of_the_answer_and_its_end():
    model = tiny_llama()
    row = with_labels(PROMPT, ANSWER, END)
    with torch.no_grad():
        found = model(**{name: torch.tensor([ids]) for name, ids in row.items()})
    log_probabilities = found.logits[0].log_softmax(-1)
    expected = -sum(log_probabilities[place - 1, token] for place, token in ((3, 8), (4, 9), (5, END))) / 3
    assert found.loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_rows_that_are_too_long_are_left_out_whole():
    row = with_labels(PROMPT, ANSWER, END)
    assert row == {"input_ids": [5, 6, 7, 8, 9, 1], "attention_mask": [1] * 6, "labels": [-100, -100, -100, 8, 9, 1]}
    assert with_labels(PROMPT, ANSWER, END, max_length=6) == row
    assert with_labels(PROMPT, ANSWER, END, max_length=5) is None


class Letters:
    """A tokenizer of one token a letter, after a token of its own."""

    eos_token_id = 1

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [0] * add_special_tokens + [ord(letter) for letter in text]}


def test_rows_that_are_left_out_are_counted():
    kept, left_out = encode_all([("ab", "c"), ("ab", "cde")], Letters(), max_length=5)
    assert [row["input_ids"] for row in kept] == [[0, ord("a"), ord("b"), ord("c"), 1]]
    assert left_out == 1
