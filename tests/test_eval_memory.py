"""Bytes that a call needs at most, against sums by hand."""

import torch
from torch import nn

from eval.harness.memory import peak_bytes

MIB = 2**20


def test_tensors_that_live_together_are_added_up_and_freed_ones_are_not():
    def call():
        a = torch.zeros(MIB // 4)
        b = torch.zeros(MIB // 4)
        del a
        c = torch.zeros(2 * MIB // 4)
        return b, c

    assert peak_bytes(call) == 3 * MIB


def test_memory_from_before_is_not_counted_whatever_views_are_taken_of_it():
    x = torch.zeros(64, 64)

    def call():
        x.t().unsqueeze(0).transpose(1, 2)
        x.unbind()
        x.add_(1)
        torch._foreach_mul_([x[:32], x[32:]], 2.0)

    assert peak_bytes(call) == 0


def test_a_step_of_a_linear_layer_needs_its_output_and_the_gradients():
    layer = nn.Linear(256, 512, bias=False)
    x = torch.zeros(1024, 256)
    output, gradient = 4 * 1024 * 512, 4 * 256 * 512

    def step():
        y = layer(x)
        y.backward(torch.ones_like(y))
        layer.weight.grad = None

    # Backward: the output, its gradient, and the weight's; a sum and its expansion would be a few bytes.
    assert peak_bytes(step) == 2 * output + gradient
