"""MoRA: its change is the paper's, written out index by index, and merges into the base."""

import math

import numpy as np
import pytest
import torch
from helpers_eval import plain_model, settings
from torch import nn

from eval.baselines import prepare
from eval.baselines.mora import MoRALinear

# (in, out, r): blocks that fit and that do not, an output longer and shorter than the input, rotation and sharing.
SHAPES = [(32, 32, 2), (24, 16, 2), (16, 24, 2), (30, 7, 1), (7, 30, 1), (48, 20, 4), (300, 310, 128), (310, 290, 130)]
every_shape = pytest.mark.parametrize("shape", SHAPES)


def layer(shape) -> MoRALinear:
    n, m, r = shape
    found = MoRALinear(nn.Linear(n, m), r).double()
    nn.init.normal_(found.mora_M)
    return found


def change(x, M, out_features, r):
    """f_decomp(M f_comp(x)) for one vector x, by loops."""
    size = len(M)
    count = math.ceil(len(x) / size)
    filled = [x[i % len(x)] for i in range(count * size)]
    if r >= 128:
        compressed = [sum(filled[i] for i in range(len(filled)) if i % size == k) for k in range(size)]
        y = M @ np.array(compressed)
    else:
        y = []
        for j in range(count):
            block, half = filled[j * size : (j + 1) * size], size // 2
            rotated = np.zeros(size)
            for i in range(half):
                angle = j * 10000 ** (-2 * i / size)
                rotated[i] = block[i] * math.cos(angle) - block[i + half] * math.sin(angle)
                rotated[i + half] = block[i] * math.sin(angle) + block[i + half] * math.cos(angle)
            y.extend(M @ rotated)
    return np.array([y[o % len(y)] for o in range(out_features)])


@every_shape
def test_the_change_is_the_papers(shape):
    n, m, r = shape
    mora, x = layer(shape), torch.randn(n, dtype=torch.float64)
    with torch.no_grad():
        found = mora(x) - mora.base_layer(x)
    expected = change(x.numpy(), mora.mora_M.detach().numpy(), m, r)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9, atol=1e-9)


@every_shape
def test_it_merges_into_the_base(shape):
    mora, x = layer(shape), torch.randn(2, 3, shape[0], dtype=torch.float64)
    merged = nn.functional.linear(x, mora.base_layer.weight + mora.delta_weight(), mora.base_layer.bias)
    torch.testing.assert_close(mora(x), merged)


@every_shape
def test_the_matrix_has_no_more_parameters_than_lora_and_starts_at_zero(shape):
    n, m, r = shape
    M = MoRALinear(nn.Linear(n, m), r).mora_M
    assert M.shape[0] == M.shape[1] and not M.any()
    smallest = 2 if r < 128 else 1  # rotation needs an even number
    assert M.numel() <= r * (m + n) < (len(M) + smallest) ** 2


def test_a_small_matrix_makes_a_change_of_high_rank():
    mora = layer((32, 32, 2))  # r̂ = 10
    assert np.linalg.matrix_rank(mora.delta_weight().numpy()) > 2 * len(mora.mora_M)


def test_the_wrapped_layers_are_those_that_peft_adapts_and_the_base_is_frozen():
    model = prepare(plain_model("bert"), settings("mora"), []).model
    lora = prepare(plain_model("bert"), settings("lora"), []).model
    wrapped = {name for name, module in model.named_modules() if isinstance(module, MoRALinear)}
    assert wrapped == set(lora.base_model.targeted_module_names)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{name}.mora_M" for name in wrapped} | {"classifier.weight", "classifier.bias"}


def test_the_rank_is_that_of_the_whole_change():
    prepared = prepare(plain_model("llama"), settings("mora"), [])
    assert set(prepared.effective_rank(prepared.model).values()) == {0}
    for name, module in prepared.model.named_modules():
        if isinstance(module, MoRALinear):
            nn.init.normal_(module.mora_M)
            sigma = np.linalg.svd(module.delta_weight().numpy())[1]
            assert prepared.effective_rank(prepared.model)[name] == (sigma > 0.01 * sigma[0]).sum()
