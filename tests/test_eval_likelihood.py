"""Batched likelihoods against one choice at a time, without batches, padding or sharing, in float64."""

import copy

import numpy as np
import pytest
import torch
from helpers_commonsense import byte_tokenizer, causal_model, task_rows
from transformers import GPT2Config, GPT2LMHeadModel

from eval.harness.likelihood import chosen, chosen_by_length, encode_pair, log_likelihoods, log_probability

CONTEXTS = [
    "the cat sat on",
    "a ",
    "red\n",
    "Answer: naïve 東京 in 1984 \n\n",
    "not very very very very red mat and dog",
]
CONTINUATIONS = ["answer1", "answer2", "answer5", "true", "the correct answer is false", "x"]


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def pairs(tokenizer):
    return [encode_pair(tokenizer, context, text) for context in CONTEXTS for text in CONTINUATIONS]


def llama():
    return causal_model()


def gpt2():
    """Positions are learned ones here: padding that shifts them would show."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=400, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.3)
    return GPT2LMHeadModel(config).eval()


def one_by_one(model, pairs):
    """One pass a pair, one term a token, in float64."""
    model = copy.deepcopy(model).double()
    found = []
    for context, continuation in pairs:
        ids = context + continuation
        with torch.no_grad():
            probabilities = model(torch.tensor([ids])).logits[0].softmax(-1)
        found.append(sum(float(probabilities[i - 1, ids[i]].log()) for i in range(len(context), len(ids))))
    return found


@pytest.mark.parametrize("build", [llama, gpt2])
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_likelihoods_are_those_of_one_pair_at_a_time(build, batch_size, pairs):
    model = build()
    found = log_likelihoods(model, pairs, batch_size)
    np.testing.assert_allclose(found, one_by_one(model, pairs), rtol=0, atol=2e-4)
    np.testing.assert_allclose(log_likelihoods(model.double(), pairs, batch_size), one_by_one(model, pairs), atol=1e-9)


def test_logits_of_half_precision_are_summed_in_float32():
    logits = (torch.randn(5, 300) * 4).bfloat16()
    tokens = torch.tensor([3, 1, 4, 1, 5])
    expected = sum(float(logits[i].double().softmax(0)[token].log()) for i, token in enumerate(tokens))
    assert log_probability(logits, tokens).dtype == torch.float32
    assert float(log_probability(logits, tokens)) == pytest.approx(expected, rel=1e-6)


def test_choices_that_differ_in_the_last_token_share_a_pass(tokenizer):
    model, read = causal_model(), []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    numbered = [encode_pair(tokenizer, "the cat", f" answer{i}") for i in range(1, 5)]
    assert len({tuple(c + t) for c, t in numbered}) == 4
    found = log_likelihoods(model, [*numbered, *numbered], 8)
    assert read == [(1, len(numbered[0][0] + numbered[0][1]) - 1)]
    assert found[:4] == found[4:] and len(set(found)) == 4


def test_one_input_with_two_cuts(tokenizer):
    """The same tokens, but more of them are the continuation."""
    model, ids = causal_model(), tokenizer.encode("the cat sat on the mat")
    pairs = [(ids[:cut], ids[cut:]) for cut in range(1, len(ids))]
    np.testing.assert_allclose(log_likelihoods(model, pairs, 4), one_by_one(model, pairs), atol=2e-4)


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("continuation", CONTINUATIONS)
def test_pairs_are_cut_as_lm_eval_cuts_them(context, continuation, tokenizer):
    from lm_eval.models.huggingface import HFLM

    theirs = HFLM(pretrained=causal_model(), tokenizer=tokenizer)._encode_pair(context, continuation)
    assert encode_pair(tokenizer, context, continuation) == theirs
    assert theirs[0] + theirs[1] == tokenizer.encode(context + continuation)


def test_nothing_is_cut_off(tokenizer):
    model = causal_model(max_position_embeddings=16)
    pairs = [encode_pair(tokenizer, "cat " * 30, "dog")]
    with pytest.raises(ValueError, match="the model reads 16"):
        log_likelihoods(model, pairs, 1)


@pytest.mark.parametrize("context, continuation", [("", "cat"), ("  \n", "cat"), ("cat", "")])
def test_a_context_and_a_continuation_have_to_be_there(context, continuation, tokenizer):
    with pytest.raises(ValueError, match="have to have a token each"):
        encode_pair(tokenizer, context, continuation)


def test_choice_is_numpys_argmax_by_sum_and_by_characters():
    generator = np.random.default_rng(0)
    texts = ["yes", "no, never", "東京", "perhaps one day"]
    for _ in range(50):
        values = -generator.integers(1, 6, size=len(texts)).astype(float)  # with ties
        assert chosen(values) == np.argmax(values)
        assert chosen_by_length(values, texts) == np.argmax(values / np.array([len(t) for t in texts]))


def test_rows_of_the_helper_have_choices_of_mixed_length():
    """What the other tests of this file and of test_eval_lm_eval.py rest on."""
    counts = {len(row["instruction"].rsplit(": ", 1)[1].split("/")) for row in task_rows("ARC-Easy", 9)}
    assert counts == {3, 4, 5}
