"""The fused low-rank products against their composition from differentiable operations."""

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck

from peft_scalora.maths.low_rank import add_low_rank, add_low_rank_reference, linear_plus_low_rank

M, N, R = 5, 7, 2
NAMES = ("y", "x", "A", "B")


def tensors(lead=(3, 2), K=4, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "y": (*lead, M),
        "x": (*lead, N),
        "A": (R, N),
        "B": (M, R),
        "U": (M, K),
        "V": (K, N),
        "W": (M, N),
        "b": (M,),
    }
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for name, shape in shapes.items()
    }


def fused(t, base, s=1.5, u=0.5):
    factors = (t["A"], t["B"], t["U"], t["V"], s, u)
    return linear_plus_low_rank(t["x"], t["W"], t["b"], *factors) if base else add_low_rank(t["y"], t["x"], *factors)


def composed(t, base, s=1.5, u=0.5):
    y = t["x"] @ t["W"].T + t["b"] if base else t["y"]
    return add_low_rank_reference(y, t["x"], t["A"], t["B"], t["U"], t["V"], s, u)


@pytest.mark.parametrize("base", [True, False])
@pytest.mark.parametrize("K", [0, 1, 4])
@pytest.mark.parametrize("lead", [(), (3,), (3, 2), (0, 2)])
def test_value_and_gradients(base, K, lead):
    results = []
    for function in (fused, composed):
        t = tensors(lead, K)
        for name in NAMES:
            t[name].requires_grad_()
        out = function(t, base)
        out.backward(torch.arange(out.numel(), dtype=out.dtype).view(out.shape))
        results.append((out, *(t[name].grad for name in NAMES[base:])))
    for ours, expected in zip(*results):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("base", [True, False])
@pytest.mark.parametrize("scale", [1.0, torch.tensor(0.5)])
def test_trace_can_be_saved(tmp_path, base, scale):
    def run(x):
        return fused(t | {"x": x}, base, u=scale)

    t = tensors()
    torch.jit.save(torch.jit.trace(run, t["x"]), str(tmp_path / "trace.pt"))
    x = tensors(lead=(3, 2), seed=1)["x"]
    torch.testing.assert_close(torch.jit.load(str(tmp_path / "trace.pt"))(x), composed(t | {"x": x}, base, u=scale))


@pytest.mark.parametrize("base", [True, False])
@pytest.mark.parametrize("trained", [("x", "A", "B"), ("A",), ("B",), ("x",)])
def test_every_order_of_derivative_by_finite_differences(base, trained):
    t = tensors()

    def function(*values):
        return fused(t | dict(zip(trained, values)), base)

    values = tuple(t[name].clone().requires_grad_() for name in trained)
    assert gradcheck(function, values, check_forward_ad=True)
    assert gradgradcheck(function, values, check_fwd_over_rev=True)


def test_forward_derivative_in_the_base_weight():
    t, tangents = tensors(), tensors(seed=1)
    derivatives = []
    for function in (fused, composed):
        with forward_ad.dual_level():
            duals = {n: forward_ad.make_dual(t[n], tangents[n]) if n in ("x", "W", "b", "A") else t[n] for n in t}
            derivatives.append(forward_ad.unpack_dual(function(duals, True)).tangent)
    torch.testing.assert_close(*derivatives, rtol=1e-12, atol=1e-12)


def test_per_sample_gradients():
    t = tensors(lead=(6,))

    def loss(A, x):
        return fused(t | {"A": A, "x": x}, True).square().sum()

    ours = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(t["A"], t["x"])
    for row, gradient in zip(t["x"], ours):
        A = t["A"].clone().requires_grad_()
        loss(A, row).backward()
        torch.testing.assert_close(gradient, A.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("y_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_mixed_precision_is_as_close_to_float64_as_the_composition(dtype, y_dtype):
    exact = tensors(dtype=dtype)
    exact = {name: tensor.double() for name, tensor in exact.items()}
    exact["y"] = exact["y"].to(y_dtype).double()
    rounded = {name: tensor.to(dtype) for name, tensor in exact.items()}
    # The accumulator is float32, whatever the factors are.
    rounded |= {"y": exact["y"].to(y_dtype), "U": exact["U"].float(), "V": exact["V"].float()}
    ours, theirs, truth = fused(rounded, False), composed(rounded, False), composed(exact, False)
    assert ours.dtype == theirs.dtype
    assert (ours.double() - truth).abs().max() <= 1.5 * (theirs.double() - truth).abs().max() + 1e-7


def test_nothing_of_the_size_of_the_output_is_saved_for_backward():
    t = tensors(lead=(64,), K=4, dtype=torch.float32)
    t["A"].requires_grad_(), t["B"].requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        fused(t, True)
    mine = {tensor.untyped_storage().data_ptr() for tensor in t.values()}
    new = [tensor for tensor in saved if tensor.untyped_storage().data_ptr() not in mine]
    assert [tuple(tensor.shape) for tensor in new] == [(64, R)]
