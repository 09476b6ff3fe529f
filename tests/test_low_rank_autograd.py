"""The fused products have every autograd property of F.linear: whatever a caller does, the composed form does too."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call, grad, jacrev, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint

from peft_scalora.maths.low_rank import add_low_rank, add_low_rank_reference, linear_plus_low_rank

M, N, R = 5, 7, 2


def make_tensors(lead, K):
    generator = torch.Generator().manual_seed(len(lead) + K)
    shapes = {"y": (*lead, M), "x": (*lead, N), "A": (R, N), "B": (M, R), "U": (M, K), "V": (K, N), "W": (M, N)}
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


class Layer(torch.nn.Module):
    """One of the two entry functions, or their composition, as a module with the parameters A and B."""

    def __init__(self, t, base, fused):
        super().__init__()
        self.A, self.B = torch.nn.Parameter(t["A"].clone()), torch.nn.Parameter(t["B"].clone())
        self.t, self.base, self.fused = t, base, fused

    def forward(self, x):
        factors = (self.A, self.B, self.t["U"], self.t["V"], 1.5, 0.5)
        if self.base and self.fused:
            return linear_plus_low_rank(x, self.t["W"], None, *factors)
        y = F.linear(x, self.t["W"]) if self.base else x[..., :M] * 2
        return add_low_rank(y, x, *factors) if self.fused else add_low_rank_reference(y, x, *factors)

    def factors(self):
        return {"A": self.A.detach(), "B": self.B.detach()}

    def with_factors(self, factors, x):
        return functional_call(self, factors, (x,))


def gradients(layer, out, *inputs):
    """Gradients, weighted so that every entry of the output counts differently."""
    weight = torch.arange(out.numel(), dtype=out.dtype).view(out.shape)
    inputs = [*inputs, layer.A, layer.B]
    return torch.autograd.grad((out * weight).sum(), [tensor for tensor in inputs if tensor.requires_grad])


def in_place(change):
    def use(layer, x):
        out = layer(x.requires_grad_())
        change(out)
        return out, *gradients(layer, out, x)

    return use


def of_a_slice(layer, x):
    out = layer(x.requires_grad_())
    out[..., 1:3] *= 3
    return out, *gradients(layer, out, x)


def retained_graph(layer, x):
    out = layer(x.requires_grad_())
    loss = out.square().sum()
    first = torch.autograd.grad(loss, [x, layer.A, layer.B], retain_graph=True)
    return *first, *torch.autograd.grad(loss, [x, layer.A, layer.B])


def retained_gradient_of_the_output(layer, x):
    out = layer(x)
    out.retain_grad()
    out.square().sum().backward()
    return out.grad, layer.A.grad, layer.B.grad


def double_backward(layer, x):
    out = layer(x.requires_grad_())
    first = torch.autograd.grad(out.square().sum(), [x, layer.A, layer.B], create_graph=True)
    penalty = sum(gradient.square().sum() for gradient in first)
    return *first, *torch.autograd.grad(penalty, [x, layer.A, layer.B])


def hook_on_the_output(layer, x):
    out, seen = layer(x.requires_grad_()), []
    out.register_hook(lambda gradient: seen.append(gradient.clone()))
    out.register_hook(lambda gradient: gradient * 2)
    found = gradients(layer, out, x)
    return *seen, *found


def backward_hooks_on_the_module(layer, x):
    seen = []
    layer.register_full_backward_pre_hook(lambda module, gradients: seen.append(gradients[0]))
    layer.register_full_backward_hook(lambda module, inputs, outputs: seen.extend([inputs[0], outputs[0]]))
    out = layer(x.requires_grad_()) * 3
    found = gradients(layer, out, x)
    return *seen, *found


def func_grad(layer, x):
    return tuple(grad(lambda factors: layer.with_factors(factors, x).square().sum())(layer.factors()).values())


def func_vmap_over_inputs(layer, x):
    batch = torch.stack([x, x * 2, x - 1])
    return (vmap(functools.partial(layer.with_factors, layer.factors()))(batch),)


def func_vmap_over_factors(layer, x):
    many = {name: torch.stack([value, value * 2, -value]) for name, value in layer.factors().items()}
    return (vmap(layer.with_factors, in_dims=(0, None))(many, x),)


def func_vmap_of_grad_over_factors(layer, x):
    many = {name: torch.stack([value, value * 2, -value]) for name, value in layer.factors().items()}
    by_input = grad(lambda x, factors: layer.with_factors(factors, x).sum())
    return (vmap(by_input, in_dims=(None, 0))(x, many),)


def func_vmap_over_one_factor(layer, x):
    many = torch.stack([layer.B.detach(), layer.B.detach() + 1])
    return (vmap(lambda B: layer.with_factors({"B": B}, x))(many),)


def func_jvp(layer, x):
    return jvp(
        layer.with_factors, (layer.factors(), x), ({"A": layer.A.detach() * 2, "B": layer.B.detach() - 1}, x + 1)
    )


def func_jvp_then_in_place(layer, x):
    return jvp(lambda x: layer.with_factors(layer.factors(), x).mul_(2), (x,), (x + 1,))


def func_vjp(layer, x):
    out, pull = vjp(layer.with_factors, layer.factors(), x)
    by_factor, by_input = pull(torch.ones_like(out))
    return out, *by_factor.values(), by_input


def func_jacrev(layer, x):
    return tuple(jacrev(lambda factors: layer.with_factors(factors, x))(layer.factors()).values())


def checkpointed(use_reentrant):
    def use(layer, x):
        out = checkpoint(layer, x.requires_grad_(), use_reentrant=use_reentrant)
        out.square().sum().backward()
        return out, x.grad, layer.A.grad, layer.B.grad

    return use


def without(mode):
    def use(layer, x):
        with mode():
            out = layer(x)
            out += 1
        assert not out.requires_grad
        return (out.clone(),)

    return use


def frozen(*names):
    def use(layer, x):
        for name in names:
            getattr(layer, name).requires_grad_(False)
        out = layer(x)
        out /= 2
        assert out.requires_grad == (len(names) < 2)
        return out, *(gradients(layer, out) if out.requires_grad else ())

    return use


def saved_elsewhere(layer, x):
    with torch.autograd.graph.save_on_cpu():
        out = layer(x.requires_grad_())
        out *= 2
    return out, *gradients(layer, out, x)


def changed_saved_tensors(layer, x):
    """The number of saved tensors differs, but halving all of them must not lose one."""
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.clone(), lambda tensor: tensor):
        out = layer(x.requires_grad_())
    return out, *gradients(layer, out, x)


def of_a_transposed_input(layer, x):
    x = x.transpose(0, -2).contiguous().transpose(0, -2) if x.dim() > 1 else x
    out = layer(x.requires_grad_())
    return out, *gradients(layer, out, x)


USES = {
    "y /= 2": in_place(lambda out: out.__itruediv__(2)),
    "y += 1": in_place(lambda out: out.__iadd__(1)),
    "relu_": in_place(F.relu_),
    "two in place": in_place(lambda out: out.mul_(2).tanh_()),
    "in place on a slice": of_a_slice,
    "retain_graph": retained_graph,
    "retain_grad": retained_gradient_of_the_output,
    "double backward": double_backward,
    "hook on the output": hook_on_the_output,
    "hooks on the module": backward_hooks_on_the_module,
    "func.grad": func_grad,
    "func.vmap over inputs": func_vmap_over_inputs,
    "func.vmap over factors": func_vmap_over_factors,
    "func.vmap of grad over factors": func_vmap_of_grad_over_factors,
    "func.vmap over one factor": func_vmap_over_one_factor,
    "func.jvp": func_jvp,
    "func.jvp, in place": func_jvp_then_in_place,
    "func.vjp": func_vjp,
    "func.jacrev": func_jacrev,
    "checkpoint, reentrant": checkpointed(True),
    "checkpoint": checkpointed(False),
    "no_grad": without(torch.no_grad),
    "inference_mode": without(torch.inference_mode),
    "A frozen": frozen("A"),
    "B frozen": frozen("B"),
    "all frozen": frozen("A", "B"),
    "save_on_cpu": saved_elsewhere,
    "saved_tensors_hooks": changed_saved_tensors,
    "transposed input": of_a_transposed_input,
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
@pytest.mark.parametrize("base", [True, False], ids=["linear_plus_low_rank", "add_low_rank"])
@pytest.mark.parametrize("K", [0, 3])
def test_fused_and_composed_form_behave_alike(use, base, K):
    for lead in [(), (3,), (2, 3), (2, 2, 3), (0, 2)]:
        t = make_tensors(lead, K)
        ours, expected = (use(Layer(t, base, fused), t["x"].clone()) for fused in (True, False))
        assert len(ours) == len(expected)
        for mine, theirs in zip(ours, expected):
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_an_input_that_is_overwritten_before_the_backward_pass_is_noticed():
    t = make_tensors((3,), 3)
    for fused in (True, False):
        x = t["x"].clone()
        out = Layer(t, True, fused)(x)
        x.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()
