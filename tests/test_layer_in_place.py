"""Models that overwrite the outputs of their linear layers train, and compute what the explicit dense weights do."""

import pytest
import torch
from helpers_models import VOCABULARY, Kind, distance, floats, oracle, output, tokens, train
from torch import nn
from transformers import FalconConfig, FalconForCausalLM, LongformerConfig, LongformerForMaskedLM


def rectified():
    return nn.Sequential(nn.Linear(14, 18), nn.ReLU(inplace=True), nn.Linear(18, 10))


def tiny_longformer():
    """Divides the query in place."""
    config = LongformerConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=40, attention_window=4, pad_token_id=1, initializer_range=0.2,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return LongformerForMaskedLM(config)


def tiny_falcon():
    """Adds the attention's output to that of the MLP's last layer in place."""
    config = FalconConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.2,
        max_position_embeddings=32, bos_token_id=0, eos_token_id=1, tie_word_embeddings=False,
    )  # fmt: skip
    return FalconForCausalLM(config)


KINDS = {
    "ReLU(inplace=True)": Kind(rectified, ["0", "2"], lambda: floats(5, 14)),
    "Longformer": Kind(tiny_longformer, ["query", "value"], lambda: tokens(2, 8)),
    "Falcon": Kind(tiny_falcon, ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"], lambda: tokens(2, 8)),
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_models_that_overwrite_the_output_of_a_layer(kind):
    base, model = kind.filled()
    before = output(model, kind.inputs()).detach()
    model.train()
    train(model, kind.inputs(), 2, seed=3)
    model.eval()
    now = output(model, kind.inputs())
    assert distance(now, before) > 1e-2
    assert distance(now, oracle(base, model, kind.inputs())) < 1e-5


@pytest.mark.parametrize("targets", ["all-linear", ["query_key_value"]])
def test_falcon_trains_with_gradient_checkpointing(targets):
    kind = Kind(tiny_falcon, targets, lambda: tokens(2, 8), {"task_type": "CAUSAL_LM"})
    base, model = kind.filled()
    model.train()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    train(model, kind.inputs(), 2, seed=3)
    model.eval()
    with torch.no_grad():
        assert distance(output(model, kind.inputs()), oracle(base, model, kind.inputs())) < 1e-5
