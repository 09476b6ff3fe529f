"""HiddenStateProbe against NumPy and autograd, and the paper's bound for Peri-LN models."""

import numpy as np
import pytest
import torch
from helpers_models import tiny_bert, tiny_gpt2, tiny_llama, tokens
from torch import nn
from transformers import GemmaConfig, GemmaForCausalLM

from peft_scalora.stability import HiddenStateProbe, scale_residual, to_peri_ln
from peft_scalora.stability.blocks import norm_gain
from peft_scalora.stability.hidden_states import peri_ln_bound
from peft_scalora.stability.residual import residual_ends


def step(model, ids=None):
    ids = tokens() if ids is None else ids
    labels = torch.zeros(len(ids), dtype=int) if hasattr(model, "bert") else ids
    loss = model(input_ids=ids, labels=labels).loss
    loss.backward()
    return loss


@pytest.mark.parametrize("build", [tiny_gpt2, tiny_llama, tiny_bert])
def test_figures_equal_numpy_and_autograd(build):
    model = build().train()
    with HiddenStateProbe(model) as probe:
        step(model)
    (profile,) = probe.profiles
    states = []
    blocks = model.get_submodule(probe.stack)
    first = lambda x: x[0] if isinstance(x, tuple) else x  # noqa: E731
    blocks[0].register_forward_pre_hook(
        lambda m, args, kwargs: states.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    for block in blocks:
        block.register_forward_hook(lambda m, args, output: states.append(first(output)))
    ids = tokens()
    labels = torch.zeros(len(ids), dtype=int) if build is tiny_bert else ids
    loss = model(input_ids=ids, labels=labels).loss
    gradients = torch.autograd.grad(loss, states)
    assert len(states) == 3
    for depth, (x, gradient) in enumerate(zip(states, gradients)):
        x = x.detach().double().numpy()
        assert profile.mean_abs[depth] == pytest.approx(np.abs(x).mean(), rel=1e-5)
        assert profile.variance[depth] == pytest.approx(x.var(axis=-1).mean(), rel=1e-5)
        assert profile.rms[depth] == pytest.approx(np.linalg.norm(x) / np.sqrt(x.size), rel=1e-5)
        assert profile.gradient_norm[depth] == pytest.approx(np.linalg.norm(gradient.double().numpy()), rel=1e-4)
    assert profile.growth() == profile.mean_abs[2] / profile.mean_abs[0]


def test_passes_are_counted_and_evaluation_is_not(tmp_path):
    model = tiny_gpt2().train()
    with HiddenStateProbe(model, every=3) as probe:
        for _ in range(7):
            step(model)
            model.eval()
            model(tokens())
            model.train()
    step(model)  # after the probe
    assert [profile.forward_pass for profile in probe.profiles] == [3, 6]
    probe.plot(tmp_path / "depth.png")
    assert (tmp_path / "depth.png").read_bytes().startswith(b"\x89PNG")


def test_gradient_checkpointing_adds_nothing():
    profiles = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = tiny_gpt2().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        with HiddenStateProbe(model) as probe:
            step(model)
        profiles += probe.profiles
    assert len(profiles) == 2
    for name in ("mean_abs", "variance", "gradient_norm"):
        assert getattr(profiles[0], name) == pytest.approx(getattr(profiles[1], name), rel=1e-5)


@pytest.mark.parametrize("build", [tiny_gpt2, tiny_llama, tiny_bert])
@pytest.mark.parametrize("size", [1.0, 0.1])
def test_peri_ln_keeps_the_bound_whatever_the_weights(build, size):
    model = build().train()
    to_peri_ln(model)
    scale_residual(model, size)
    worst = 0.0
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            parameter.data = 2 * torch.randn(parameter.shape, generator=generator)
        with HiddenStateProbe(model) as probe:
            step(model)
        (profile,) = probe.profiles
        bound = probe.bound(profile)
        assert all(x <= y for x, y in zip(profile.mean_abs, bound))
        worst = max(worst, profile.mean_abs[-1] / bound[-1])
    assert worst > 0.1  # the bound is of the right size


def test_the_bound_written_out():
    """‖X_0‖_F/sqrt(nd) + 2 D (γ_max + β_max), for a model whose norms are set by hand."""
    model = tiny_gpt2().train()
    to_peri_ln(model)
    for i, block in enumerate(model.transformer.h):
        block.attn.residual_end.norm.weight.data[:] = 1.5 + i
        block.mlp.residual_end.norm.bias.data[3] = -0.25
    with HiddenStateProbe(model) as probe:
        step(model)
    (profile,) = probe.profiles
    x_0 = model.transformer.wte(tokens()) + model.transformer.wpe(torch.arange(7))
    start = np.linalg.norm(x_0.detach().numpy()) / np.sqrt(x_0.numel())
    assert probe.bound(profile) == pytest.approx([start + 2 * depth * (2.5 + 0.25) for depth in range(3)], rel=1e-5)
    assert peri_ln_bound(1.0, 2, 2.0, 1.0, 0.1) == pytest.approx([1.0, 1.6, 2.2])


def test_the_gain_is_what_a_norm_does_not_what_its_weight_says():
    """Gemma multiplies by 1 + weight: γ_max is 1 + 0.75."""
    config = GemmaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    model = GemmaForCausalLM(config).train()
    to_peri_ln(model)
    list(residual_ends(model).values())[1].norm.weight.data[4] = 0.75
    with HiddenStateProbe(model) as probe:
        step(model)
    (profile,) = probe.profiles
    assert probe.bound(profile) == pytest.approx([profile.rms[0] + 2 * depth * 1.75 for depth in range(3)], rel=1e-5)


@pytest.mark.parametrize("width", [2, 3, 7, 8])
@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
def test_gains_and_biases_are_the_weights_of_ordinary_norms(kind, width):
    norm = kind(width)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    gain, bias = norm_gain(norm)
    torch.testing.assert_close(gain, norm.weight.detach().abs(), rtol=1e-5, atol=1e-6)
    expected = torch.zeros(width) if kind is nn.RMSNorm else norm.bias.detach().abs()
    torch.testing.assert_close(bias, expected, rtol=1e-5, atol=1e-6)


def test_models_without_blocks_or_peri_ln_are_refused():
    with pytest.raises(ValueError, match="Linear has no list of blocks: nothing to probe"):
        HiddenStateProbe(nn.Linear(2, 2))
    model = tiny_gpt2().train()
    scale_residual(model, 0.1)
    with HiddenStateProbe(model) as probe:
        step(model)
    with pytest.raises(ValueError, match="one of Peri-LN models: call to_peri_ln"):
        probe.bound(probe.profiles[0])
