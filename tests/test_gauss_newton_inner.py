"""Conjugate gradients, damping, schedules, the choice of a step size, and how parameters are grouped."""

import math

import numpy as np
import pytest
import torch
from helpers_models import tiny_gpt2

from peft_scalora.gauss_newton import layers_of, matrix_names
from peft_scalora.gauss_newton.inner import adapt_damping, conjugate_gradient, inner_rate
from peft_scalora.gauss_newton.line_search import best_step_size, step_sizes


def test_line_search_choice():
    assert step_sizes(3) == [1.0, 2**-0.5, 0.5, 0.0]
    alphas = [1.0, 0.5, 0.0]
    assert best_step_size(alphas, [3.0, 2.0, 2.5]) == 0.5
    assert best_step_size(alphas, [2.0, 2.0, 2.5]) == 1.0
    assert best_step_size(alphas, [2.6, 2.5, 2.5]) == 0.0
    assert best_step_size(alphas, [math.nan, 2.0, 2.5]) == 0.5
    assert best_step_size(alphas, [-math.inf, math.inf, 2.5]) == 0.0
    assert best_step_size(alphas, [math.nan, 4.0, math.inf]) == 0.5
    assert best_step_size(alphas, [math.nan] * 3) == 0.0


@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_conjugate_gradient_solves_the_damped_system(damping):
    rng = np.random.default_rng(0)
    X = rng.standard_normal((20, 7))
    G, g = X.T @ X, rng.standard_normal(7)

    def split(vector):
        return {"a": torch.tensor(vector[:3]), "b": torch.tensor(vector[3:]).view(2, 2)}

    def join(parts):
        return np.concatenate([parts["a"].numpy(), parts["b"].numpy().ravel()])

    s, decrease = conjugate_gradient(lambda v: split(G @ join(v)), split(g), damping, 50)
    solution = np.linalg.solve(G + damping * np.eye(7), -g)
    np.testing.assert_allclose(join(s), solution, rtol=1e-8)
    assert decrease == pytest.approx(-(g @ solution + 0.5 * solution @ G @ solution), rel=1e-8)
    s, decrease = conjugate_gradient(lambda v: split(G @ join(v)), split(g), damping, 2)
    assert decrease == pytest.approx(-(g @ join(s) + 0.5 * join(s) @ G @ join(s)), rel=1e-8)


def test_conjugate_gradient_stops_where_the_model_is_flat():
    s, decrease = conjugate_gradient(lambda v: {"a": 0 * v["a"]}, {"a": torch.ones(3)}, 0.0, 5)
    assert not s["a"].any() and decrease == 0


def test_damping_follows_the_models_promise():
    assert adapt_damping(1.0, actual=0.9, predicted=1.0) == pytest.approx(1 / 1.5)
    assert adapt_damping(1.0, actual=0.5, predicted=1.0) == 1.0
    assert adapt_damping(1.0, actual=0.1, predicted=1.0) == 1.5
    assert adapt_damping(1.0, actual=math.nan, predicted=1.0) == 1.5


def test_damping_moves_at_a_quarter_and_at_three_quarters():
    """The rule as Martens (2010, section 4.1) states it: λ ← 3/2 λ if ρ < 1/4, λ ← 2/3 λ if ρ > 3/4."""

    def rule(damping, ratio):
        if ratio < 1 / 4:
            return 3 / 2 * damping
        if ratio > 3 / 4:
            return 2 / 3 * damping
        return damping

    for ratio in (-1.0, 0.0, 0.2499, 0.25, 0.2501, 0.5, 0.51, 0.74, 0.75, 0.7501, 1.0, 2.0):
        expected = pytest.approx(rule(0.3, ratio))
        assert adapt_damping(0.3, actual=4 * ratio, predicted=4.0) == expected, ratio


def test_inner_cosine():
    assert [inner_rate("cosine", k, 4) for k in range(4)] == pytest.approx([1, 0.85355339, 0.5, 0.14644661])
    assert inner_rate("constant", 3, 4) == 1


def test_layers_and_matrices_of_a_transformer():
    model = tiny_gpt2()
    names = [n for n, _ in model.named_parameters()]
    embedding, first, second, head = layers_of(names)
    assert embedding == ["transformer.wte.weight", "transformer.wpe.weight"]
    assert all(n.startswith("transformer.h.0.") for n in first) and all(
        n.startswith("transformer.h.1.") for n in second
    )
    assert head == ["transformer.ln_f.weight", "transformer.ln_f.bias", "lm_head.weight"]
    assert matrix_names(model) == {n for n in first + second if "attn.c" in n or "mlp.c" in n} - {
        n for n in names if n.endswith("bias")
    }
