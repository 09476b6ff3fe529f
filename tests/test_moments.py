"""moments.py against a twin that was trained on the scaled gradients from its first step."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_optimizers import BITSANDBYTES_8, OPTIMIZERS, make
from helpers_rescale import Net, adapted, backward, fill_factors, layers_of, train, trainable
from torch import nn

import peft_scalora
from peft_scalora.rescaling import moments
from peft_scalora.rescaling.moments import OptimizerState, carried_scales, carry, check_state, multiply

EIGHT_BIT = sorted(BITSANDBYTES_8)
EXACT = [name for name in OPTIMIZERS if name not in BITSANDBYTES_8]
STEPS = 12


def transport(optimizer, params, scale_LR, dim):
    """Carry the optimizer's state through a scaling of the other factor."""
    optimizer = OptimizerState.of(optimizer)
    powers = tuple(optimizer.carried(params[0]).values())
    carry(optimizer, params, carried_scales(powers, torch.ones_like(scale_LR), scale_LR), dim)


class Pair:
    """Two layers' factors, stepped by one optimizer on given gradients, and the twin on scaled ones."""

    def __init__(self, name, shape, scale_LR, dim, dtype=torch.float32):
        self.shape, self.scale_LR, self.dim = shape, scale_LR, dim
        self.params, self.twins = ([nn.Parameter(torch.zeros(shape, dtype=dtype)) for _ in scale_LR] for _ in range(2))
        self.optimizer, self.twin = make(name, self.params), make(name, self.twins)
        self.generator = torch.Generator().manual_seed(1)

    def broadcast(self, scale_R):
        return scale_R[:, None] if self.dim == 0 else scale_R[None]

    def step(self, main_is_scaled=False):
        for p, twin, scale_R in zip(self.params, self.twins, self.scale_LR):
            # Elements of different sizes, so that block-wise quantization has something to lose.
            grad = torch.randn(self.shape, generator=self.generator) * torch.rand(self.shape, generator=self.generator)
            grad = grad.to(p.dtype)
            scaled = (grad * self.broadcast(scale_R)).to(p.dtype)
            p.grad, twin.grad = scaled.clone() if main_is_scaled else grad, scaled
        self.optimizer.step()
        self.twin.step()

    def train(self):
        for _ in range(STEPS):
            self.step()
        return self

    def states(self):
        """Layer, state name, value, twin's value, of every tensor that the optimizer keeps."""
        for layer, (p, twin) in enumerate(zip(self.params, self.twins)):
            for name, value in self.optimizer.state[p].items():
                if isinstance(value, torch.Tensor):
                    yield layer, name, value, self.twin.state[twin][name]


def powers_of_two(layers, r, seed=0):
    return 2.0 ** torch.randint(-6, 7, (layers, r), generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.parametrize("dim", [0, 1], ids=["rows", "columns"])
@pytest.mark.parametrize("name", EXACT)
def test_transported_state_is_that_of_a_twin_scaled_from_the_beginning(name, dim):
    """Bit for bit with powers of two; and so are the steps that follow."""
    scale = powers_of_two(2, 4)
    pair = Pair(name, (4, 6) if dim == 0 else (6, 4), scale, dim).train()
    per_element = [not torch.equal(value, twin) for _, _, value, twin in pair.states() if value.dim() == 2]
    assert any(per_element) or name == "SGD", "nothing had to be carried"
    transport(pair.optimizer, pair.params, scale, dim)
    for layer, state, value, twin in pair.states():
        assert torch.equal(value, twin), (layer, state)

    for p in pair.params + pair.twins:
        p.data.zero_()
    for _ in range(3):
        pair.step(main_is_scaled=True)
    for p, twin in zip(pair.params, pair.twins):
        assert p.any() and torch.equal(p, twin)


@pytest.mark.parametrize("name", EXACT)
def test_transported_state_with_ordinary_scales(name):
    scale = 10 ** (4 * torch.rand(2, 4) - 2)
    pair = Pair(name, (6, 4), scale, dim=1).train()
    transport(pair.optimizer, pair.params, scale, 1)
    for _, _, value, twin in pair.states():
        torch.testing.assert_close(value, twin, rtol=1e-5, atol=1e-6 * float(twin.abs().max()))


@pytest.mark.parametrize(
    "dtype, rtol", [(torch.bfloat16, 0.0), (torch.float64, 0.0), (torch.float16, 5e-3)]
)  # the squares in a float16 history are subnormal, so that its rounding does not scale
def test_state_of_other_dtypes(dtype, rtol):
    scale = powers_of_two(2, 4).clamp(min=2**-1)
    pair = Pair("AdamW amsgrad foreach", (6, 4), scale, dim=1, dtype=dtype).train()
    transport(pair.optimizer, pair.params, scale, 1)
    for _, _, value, twin in pair.states():
        torch.testing.assert_close(value, twin, rtol=rtol, atol=0)
        assert value.dim() == 0 or value.dtype == dtype


def dequantized(state, name):
    from bitsandbytes.functional import dequantize_blockwise

    number = name.removeprefix("state")
    return dequantize_blockwise(
        state[name].contiguous(), absmax=state[f"absmax{number}"], code=state[f"qmap{number}"], blocksize=256
    )


def quantized_states(pair):
    for p, twin in zip(pair.params, pair.twins):
        for name in ("state1", "state2"):
            if name in pair.optimizer.state[p]:
                assert pair.optimizer.state[p][name].dtype == torch.uint8
                yield name, dequantized(pair.optimizer.state[p], name), dequantized(pair.twin.state[twin], name)


def block_error(value, expected):
    """Largest difference in units of the largest value of its block of 256."""
    blocks, expected = value.flatten().split(256), expected.flatten().split(256)
    return max(float((v - e).abs().max() / e.abs().max()) for v, e in zip(blocks, expected))


@pytest.mark.parametrize("dim, shape", [(0, (4, 128)), (1, (128, 4)), (0, (4, 333))], ids=["rows", "columns", "odd"])
@pytest.mark.parametrize("name", EIGHT_BIT)
def test_eight_bit_states_within_their_quantization(name, dim, shape):
    """The 8-bit code has gaps of up to 1.4% of the block's maximum, and every step of either optimizer rounds to it."""
    scale = powers_of_two(2, 4).clamp(2**-2, 2**2)
    pair = Pair(name, shape, scale, dim).train()
    before = [block_error(value, twin) for _, value, twin in quantized_states(pair)]
    assert len(before) == (4 if "Adam" in name else 2) and min(before) > 0.2, "nothing had to be carried"
    powers = [moments.rule_for(pair.optimizer)[state] for state, _, _ in quantized_states(pair)]
    scales = [pair.broadcast(scale_R) for scale_R in scale for _ in range(len(before) // 2)]
    expected = [value * by**power for (_, value, _), by, power in zip(quantized_states(pair), scales, powers)]
    transport(pair.optimizer, pair.params, scale, dim)
    for want, (_, value, twin) in zip(expected, quantized_states(pair)):
        assert block_error(value, want) < 0.0075
        assert block_error(value, twin) < 0.08


@pytest.mark.parametrize("name", EIGHT_BIT)
def test_scales_of_one_leave_eight_bit_states_alone(name):
    """A layer that is skipped goes through with scales of 1."""
    pair = Pair(name, (4, 512), torch.ones(2, 4), dim=0).train()
    transport(pair.optimizer, pair.params, torch.ones(2, 4), 0)
    for layer, state, value, twin in pair.states():
        assert torch.equal(value, twin), (layer, state)


def test_every_rule_has_a_twin():
    tested = {type(make(name, [nn.Parameter(torch.zeros(2, 2))])) for name in EXACT}
    # DeepSpeed's are tested in test_distributed.py, and have the states of torch's Adam.
    deepspeed = {"FusedAdam", "DeepSpeedCPUAdam"}
    assert {cls.__name__ for cls in tested} | deepspeed >= set(moments.RULES)
    assert all(moments.RULES[name] == moments.RULES["Adam"] for name in deepspeed)


@pytest.mark.parametrize("dim, shape", [(0, (3, 5)), (1, (5, 3)), (0, (3, 2, 4, 4)), (1, (5, 3, 1, 1))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_multiply_along_a_dimension(dim, shape, dtype):
    """Also for convolution kernels, of which lora_A has the rank first and lora_B second."""
    tensors = [torch.randn(shape).to(dtype) for _ in range(2)]
    scale_LR = torch.rand(2, 3) + 0.5
    einsum = "l...,l->l..." if dim == 0 else "ml...,l->ml..."
    expected = [torch.einsum(einsum, t.double(), scale.double()) for t, scale in zip(tensors, scale_LR)]
    storage = [t.data_ptr() for t in tensors]
    multiply([tensors], scale_LR[None], dim)
    assert [t.data_ptr() for t in tensors] == storage
    for tensor, want in zip(tensors, expected):
        assert tensor.dtype == dtype
        torch.testing.assert_close(tensor.double(), want, rtol=torch.finfo(dtype).eps, atol=0)


def test_gradients_follow_the_other_factor():
    """∂loss/∂Ã and ∂loss/∂B̃ by central differences, for a loss that is not quadratic (Lemmas 3.3, 3.6)."""
    rng = np.random.default_rng(0)
    W, A, B = rng.standard_normal((5, 4)), rng.standard_normal((5, 3)), rng.standard_normal((4, 3))
    alpha, beta, s = rng.uniform(0.2, 3, 3), rng.uniform(0.2, 3, 3), 1.3
    folded = W + s * (A @ B.T - A * alpha @ (B * beta).T)

    def loss(weight):
        return np.sum(np.sin(weight)) + np.sum(weight**3) / 10

    def differences(function, X, h=1e-6):
        result = np.zeros_like(X)
        for index in np.ndindex(*X.shape):
            step = np.zeros_like(X)
            step[index] = h
            result[index] = (function(X + step) - function(X - step)) / (2 * h)
        return result

    G = np.cos(W + s * A @ B.T) + 0.3 * (W + s * A @ B.T) ** 2
    grad_B, grad_A = torch.tensor(s * G @ B), torch.tensor((s * G.T @ A).T.copy())  # of lora_B and of lora_A
    multiply([[grad_B]], torch.tensor(beta)[None, None], dim=1)
    multiply([[grad_A]], torch.tensor(alpha)[None, None], dim=0)
    np.testing.assert_allclose(
        grad_B, differences(lambda X: loss(folded + s * X @ (B * beta).T), A * alpha), rtol=1e-6, atol=1e-6
    )
    np.testing.assert_allclose(
        grad_A.T, differences(lambda X: loss(folded + s * A * alpha @ X.T), B * beta), rtol=1e-6, atol=1e-6
    )


class Custom(torch.optim.Optimizer):
    """Keeps `state` as a state of its own under the name "memory"."""

    def __init__(self, params, state):
        super().__init__(params, {"lr": 1e-3})
        self.keep = state

    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            self.state[p].setdefault("memory", self.keep(p))


class AdamWithMemory(torch.optim.Adam):
    def step(self, closure=None):
        super().step(closure)
        for p in self.param_groups[0]["params"]:
            self.state[p]["slow"] = p.detach().clone()


class ProjectedAdam(torch.optim.Adam):
    """With moments of a projection of the gradient, as GaLore has: being an Adam does not make them Adam's."""

    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            self.state[p]["exp_avg"] = torch.zeros(1, p.shape[1])


# Factorised and flattened moments do not have the shape of their parameter.
UNKNOWN = {
    "Adadelta": (torch.optim.Adadelta, ["square_avg", "acc_delta"]),
    "Rprop": (torch.optim.Rprop, ["prev", "step_size"]),
    "ASGD": (torch.optim.ASGD, ["ax"]),
    "Adafactor": (torch.optim.Adafactor, ["row_var", "col_var"]),
    "Custom": (lambda params: Custom(params, torch.zeros_like), ["memory"]),
    "Custom list": (lambda params: Custom(params, lambda p: [torch.zeros_like(p)]), ["memory"]),
    "Custom per row": (lambda params: Custom(params, lambda p: torch.zeros(len(p))), ["memory"]),
    "Custom flat": (lambda params: Custom(params, lambda p: torch.zeros(p.numel())), ["memory"]),
    "AdamWithMemory": (AdamWithMemory, ["slow"]),
    "ProjectedAdam": (ProjectedAdam, ["exp_avg"]),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_state_is_refused_by_name(name):
    factory, states = UNKNOWN[name]
    p = nn.Parameter(torch.ones(3, 4))
    optimizer = factory([p])
    check_state(optimizer, p)  # nothing is kept yet
    p.grad = torch.ones(3, 4)
    optimizer.step()
    with pytest.raises(
        TypeError, match=f"'{states[0]}'.* of optimizer {name.split()[0]} .*Optimizers that work: .*AdamW"
    ) as error:
        check_state(optimizer, p)
    assert all(repr(state) in str(error.value) for state in states)


def test_lbfgs_is_refused():
    """It keeps the history of all parameters flattened in the state of the first."""
    params = [nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(4, 3))]
    optimizer = torch.optim.LBFGS(params, max_iter=3)

    def closure():
        optimizer.zero_grad()
        loss = (params[0] @ params[1]).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with pytest.raises(TypeError, match="of optimizer LBFGS"):
        check_state(optimizer, params[0])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_known_state_is_accepted(name):
    p = nn.Parameter(torch.ones(16, 32))
    optimizer = make(name, [p])
    for _ in range(2):
        p.grad = torch.randn(16, 32)
        optimizer.step()
        check_state(optimizer, p)


# Optimizers from outside the package


class SignMomentum(torch.optim.Optimizer):
    """Steps by the sign of an average of gradients, as Lion does, under names of its own."""

    def __init__(self, params, lr=1e-2):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            average = self.state[p].setdefault("average", torch.zeros_like(p))
            average.lerp_(p.grad, 0.1)
            p.sub_(average.sign(), alpha=self.param_groups[0]["lr"])


class SignMomentumOfMine(SignMomentum):
    """Found by its base class."""


class AdamW(torch.optim.AdamW):
    """Has a known name, and moments of gradients that were divided by their norm."""


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setattr(moments, "_registered", dict(moments._registered))


@pytest.mark.parametrize("cls", [SignMomentum, SignMomentumOfMine])
def test_a_registered_optimizer_trains(cls, registered):
    """Its average after a rescaling is that of gradients that had been scaled from the beginning."""
    torch.manual_seed(0)
    model = fill_factors(adapted(Net(), scaling_interval=3))
    optimizer = cls(trainable(model), lr=1e-2)
    with pytest.raises(TypeError, match=f"'average' of optimizer {cls.__name__} .*peft_scalora.register_optimizer"):
        train(model, optimizer, 2)
    peft_scalora.register_optimizer(SignMomentum, {"average": 1})
    train(model, optimizer, 2)
    layer = layers_of(model)[0]
    backward(model)
    before = [(p.detach().clone(), optimizer.state[p]["average"].clone()) for p in layer.factors("default")]
    report = peft_scalora.rescale(model, optimizer)
    assert report.layers == 3 and report.skipped == 0
    (old_B, average_B), (old_A, average_A) = before
    lora_B, lora_A = layer.factors("default")
    alpha, beta = (lora_B / old_B)[0].detach(), (lora_A / old_A)[:, 0].detach()
    assert ((alpha - 1).abs() > 1e-3).any() and ((beta - 1).abs() > 1e-3).any()
    torch.testing.assert_close(optimizer.state[lora_B]["average"], average_B * beta)
    torch.testing.assert_close(optimizer.state[lora_A]["average"], average_A * alpha[:, None])


def test_a_registered_class_comes_before_a_known_name(registered):
    p = nn.Parameter(torch.ones(3, 4))
    assert moments.rule_for(AdamW([p])) == moments.RULES["AdamW"]
    peft_scalora.register_optimizer(AdamW, {"exp_avg": 0, "exp_avg_sq": 0})
    assert moments.rule_for(AdamW([p])) == {"exp_avg": 0, "exp_avg_sq": 0}
    assert moments.rule_for(torch.optim.AdamW([p])) == moments.RULES["AdamW"]


def test_a_name_that_only_resembles_a_known_one_is_none(registered):
    """docs/reference.md lists the names: "Lion" passes, "LionW" has to be registered."""

    class LionW(torch.optim.Optimizer):
        pass

    assert moments.rule_for(LionW([nn.Parameter(torch.ones(2))], {})) == {}


@pytest.mark.parametrize(
    "cls, powers, message",
    [
        (
            torch.optim.Adam([nn.Parameter(torch.ones(2))]),
            {"exp_avg": 1},
            "must be a subclass of torch.optim.Optimizer",
        ),
        (nn.Linear, {"exp_avg": 1}, "must be a subclass of torch.optim.Optimizer"),
        (SignMomentum, {"average": "1"}, "must map names of states to whole numbers"),
        (SignMomentum, {"average": 1.0}, "must map names of states to whole numbers"),
        (SignMomentum, {0: 1}, "must map names of states to whole numbers"),
    ],
)
def test_what_is_no_rule_is_refused(cls, powers, message, registered):
    with pytest.raises(TypeError, match=message):
        peft_scalora.register_optimizer(cls, powers)


def test_documentation_names_every_optimizer():
    text = " ".join(Path("docs/reference.md").read_text().split())
    listed = re.search(r"optimizer classes with these names, and for their subclasses: (.*?)\. The same", text).group(1)
    assert set(re.findall(r"\w+", listed)) >= {*moments.RULES, "GaussNewton"}
