"""rescale.py on real PEFT models: what a rescaling leaves alone, what it carries along, and when it happens."""

import copy
import math

import numpy as np
import pytest
import reference
import torch
from accelerate import Accelerator
from helpers_models import KINDS, output
from helpers_optimizers import OPTIMIZERS, make
from peft import LoraConfig, get_peft_model
from torch import nn

from peft_scalora import ScaLoRAConfig, rescale, scaling
from peft_scalora.layer import ScaLoRALayer
from peft_scalora.rescale import last_report

NEVER = 10**6
SCALINGS = ("column", "scalar", "exact")


class Net(nn.Module):
    """Three layers, two of them of one shape."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 7)

    def forward(self, x):
        return self.last(torch.tanh(self.second(torch.tanh(self.first(x)))))


class Chain(nn.Module):
    """Linear layers without bias, all of one shape."""

    def __init__(self, layers, n=16, m=16):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(n, m, bias=False) for _ in range(layers))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def adapted(net, autocast_adapter_dtype=True, **config):
    names = [name for name, module in net.named_modules() if isinstance(module, nn.Linear)]
    config = {"r": 3, "lora_alpha": 5, "scaling_interval": NEVER, "target_modules": names} | config
    return get_peft_model(net, ScaLoRAConfig(**config), autocast_adapter_dtype=autocast_adapter_dtype)


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, ScaLoRALayer)]


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def fill_factors(model, size=0.1):
    """lora_B as after some training."""
    for layer in layers_of(model):
        nn.init.normal_(layer.factors("default")[0], std=size)
    return model


def random_gradients(model, generator=None):
    """The gradients that random dense G would give: s Gᵀ-consistent in both factors."""
    for layer in layers_of(model):
        lora_B, lora_A = layer.factors("default")
        G = torch.randn(lora_B.shape[0], lora_A.shape[1], generator=generator, dtype=torch.float64)
        s = layer.scaling["default"]
        lora_B.grad = (s * G @ lora_A.detach().double().T).to(lora_B.dtype)
        lora_A.grad = (s * lora_B.detach().double().T @ G).to(lora_A.dtype)


def move(model, size=0.3, generator=None):
    """Change the factors at random, as the steps between two rescalings do; returns the change of each weight.

    Without it a second rescaling finds columns of the right norm and has nothing to fold.
    """
    moved = []
    for layer in layers_of(model):
        before = change(layer)
        for p in layer.factors("default"):
            rms = p.detach().double().square().mean().sqrt().to(p.dtype)
            p.data.add_(torch.randn(p.shape, generator=generator).to(p.dtype), alpha=size * float(rms))
        moved.append(change(layer) - before)
    return moved


X = torch.randn(32, 12, generator=torch.Generator().manual_seed(0))
Y = torch.randn(32, 7, generator=torch.Generator().manual_seed(1))


def backward(model, x=X, y=Y):
    model.zero_grad()
    loss = (model(x) - y).square().mean()
    loss.backward()
    return loss


def train(model, optimizer, steps):
    for _ in range(steps):
        backward(model)
        optimizer.step()


def factors_of(layer, adapter="default"):
    return [p.detach().flatten(1).double().numpy().copy() for p in layer.factors(adapter)]


def accumulated(layer, adapter="default"):
    U, V = (getattr(layer, name)[adapter].double().numpy() for name in ("scalora_U", "scalora_V"))
    return U @ V if len(V) else U


def change(layer, adapter="default"):
    """s B A + U V in float64, from the tensors themselves."""
    B, A = factors_of(layer, adapter)
    return layer.scaling[adapter] * B @ A + accumulated(layer, adapter)


def snapshot(model, optimizer=None):
    """Copies of everything that a rescaling may write."""
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    for name, p in model.named_parameters():
        if p.grad is not None:
            saved[f"{name}.grad"] = p.grad.clone()
        if optimizer is not None:
            for key, value in optimizer.state.get(p, {}).items():
                saved[f"{name}.state.{key}"] = copy.deepcopy(value)
    return saved


def same(a, b):
    """Equal bits, where nan equals nan."""
    if not isinstance(a, torch.Tensor):
        return a == b
    return a.dtype == b.dtype and torch.equal(a.nan_to_num(12345.0), b.nan_to_num(12345.0))


def scales_between(before, after):
    """α and β from the factors (B, A) of a layer before and after."""
    (B0, A0), (B1, A1) = before, after
    return np.sum(B0 * B1, 0) / np.sum(B0 * B0, 0), np.sum(A0 * A1, 1) / np.sum(A0 * A0, 1)


def relative(a, b):
    return float((a - b).norm() / b.norm())


# What a rescaling leaves alone and what it carries along


@pytest.mark.parametrize(
    "accumulator", [{"accumulator": "dense"}, {}, {"accumulator_rank": 12}], ids=["dense", "8r", "full"]
)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_rescaling_keeps_the_function_and_scales_the_gradients(name, accumulator):
    """Also where it is the fifth one and the accumulator is full, if the weight has no more than R directions."""
    model = adapted(Net(), target_modules=["first", "second", "last"], **accumulator)
    optimizer = make(name, trainable(model))
    for _ in range(5 if accumulator.get("accumulator_rank") else 1):
        train(model, optimizer, 4)
        move(model, size=0.6)
        backward(model)
        before, old, saved = model(X).detach(), [factors_of(layer) for layer in layers_of(model)], snapshot(model)
        report = rescale(model, optimizer)
        assert (report.layers, report.skipped) == (3, 0)
        assert relative(model(X).detach(), before) < 1e-5
    for layer, factors in zip(layers_of(model), old):
        alpha, beta = scales_between(factors, factors_of(layer))
        assert np.abs(np.log(alpha)).max() > 0.05 and np.abs(np.log(beta)).max() > 0.01, "nothing was rescaled"
    carried = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    assert any(relative(grad, saved[f"{n}.grad"]) > 0.05 for n, grad in carried.items())
    backward(model)
    for n, p in model.named_parameters():
        if p.requires_grad:
            assert relative(carried[n], p.grad) < 1e-4, n
    optimizer.step()
    assert all(p.isfinite().all() for p in trainable(model))


def test_state_is_carried_crosswise():
    model = adapted(Net())
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2, amsgrad=True)
    train(model, optimizer, 5)
    backward(model)
    old = [factors_of(layer) for layer in layers_of(model)]
    state = copy.deepcopy(optimizer.state)
    state = [[state_of for state_of in state.values()][i] for i in range(len(state))]
    rescale(model, optimizer)
    position = {id(p): i for i, p in enumerate(trainable(model))}
    for layer, before in zip(layers_of(model), old):
        alpha, beta = (torch.tensor(x).float() for x in scales_between(before, factors_of(layer)))
        lora_B, lora_A = layer.factors("default")
        for p, other in ((lora_B, beta[None]), (lora_A, alpha[:, None])):
            was, now = state[position[id(p)]], optimizer.state[p]
            assert (other.log().abs() > 0.05).any()
            torch.testing.assert_close(now["exp_avg"], was["exp_avg"] * other, rtol=1e-5, atol=0)
            torch.testing.assert_close(now["exp_avg_sq"], was["exp_avg_sq"] * other**2, rtol=1e-5, atol=0)
            torch.testing.assert_close(now["max_exp_avg_sq"], was["max_exp_avg_sq"] * other**2, rtol=1e-5, atol=0)
            assert now["step"] == was["step"]


@pytest.mark.parametrize("kind", ["Conv1D", "Embedding", "Conv2d", "MultiheadAttention", "GPT-2", "Llama"])
def test_one_rescaling_keeps_the_function_of_every_kind_of_layer(kind):
    kind = KINDS[kind]
    _, model = kind.filled(accumulator_rank=None, init_lora_weights=False)
    before = output(model, kind.inputs()).detach()
    (output(model, kind.inputs()) - torch.randn_like(before)).square().mean().backward()
    old = [factors_of(layer) for layer in layers_of(model)]
    report = rescale(model)
    assert report.layers == len(old) > 0 and report.skipped == 0
    assert relative(output(model, kind.inputs()).detach(), before) < 1e-5
    for layer, factors in zip(layers_of(model), old):
        assert not np.allclose(factors[1], factors_of(layer)[1], rtol=1e-2)


@pytest.mark.parametrize(
    "config",
    [
        {"use_rslora": True},
        {"rank_pattern": {"second": 5}, "alpha_pattern": {"last": 1}},
        {"r": 1},
        {"r": 20},
        {"r": 16, "accumulator_rank": 2},
        {"init_lora_weights": False, "smoothness": 300.0},
        {"init_lora_weights": "orthogonal", "r": 4},
        {"lora_bias": True},
    ],
    ids=str,
)
def test_one_rescaling_keeps_the_function_of_other_configurations(config):
    """With a scale that was changed after the adapter was made, at which the accumulator is applied too."""
    model = fill_factors(adapted(Net(), **config))
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    for scale in (1.0, 0.5, 3.0):
        for layer in layers_of(model):
            layer.set_scale("default", scale)
        train(model, optimizer, 3)
        backward(model)
        before, old = model(X).detach(), [factors_of(layer) for layer in layers_of(model)]
        discarded = rescale(model, optimizer).discarded
        if "accumulator_rank" not in config:
            assert relative(model(X).detach(), before) < 1e-5
            assert discarded < 1e-5
        assert any(
            np.abs(np.log(scales_between(f, factors_of(layer))[0])).max() > 0.01
            for f, layer in zip(old, layers_of(model))
        )


def test_two_adapters_at_once():
    model = adapted(Net(), init_lora_weights=False)
    model.add_adapter("other", ScaLoRAConfig(r=3, target_modules=["first", "second"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    train(model, optimizer, 3)
    backward(model)
    before = model(X).detach()
    report = rescale(model, optimizer)
    assert (report.layers, report.skipped) == (5, 0)
    assert relative(model(X).detach(), before) < 1e-5
    for layer in layers_of(model)[:2]:
        assert min(np.linalg.norm(accumulated(layer, adapter)) for adapter in ("default", "other")) > 1e-3


@pytest.mark.parametrize("how", SCALINGS)
@pytest.mark.parametrize("config", [{"accumulator": "dense"}, {"accumulator_rank": 16}], ids=["dense", "factored"])
def test_a_thousand_rescalings_do_not_drift(config, how):
    model = fill_factors(adapted(Chain(2), r=4, scaling=how, **config))
    expected = [change(layer) for layer in layers_of(model)]
    sizes = []
    for _ in range(1000):
        expected = [was + moved for was, moved in zip(expected, move(model))]
        random_gradients(model)
        report = rescale(model)
        assert (report.layers, report.skipped) == (2, 0)
        sizes.append(report.median_log_alpha)
    assert np.median(sizes) > 0.02, "the scales have to be away from 1"
    for layer, want in zip(layers_of(model), expected):
        assert np.linalg.norm(change(layer) - want) < 1e-4 * np.linalg.norm(want)
        assert np.linalg.norm(accumulated(layer)) > 0.9 * np.linalg.norm(want), "little was folded"
        assert layer.progress("default").rescalings == 1000


@pytest.mark.parametrize("rank", [2, 5, 11])
def test_a_truncated_accumulator_drifts_no_further_than_it_reports(rank):
    """rank 2 < r, one that a fold fills at once, and one that holds two folds."""
    model = fill_factors(adapted(Chain(2), r=4, accumulator_rank=rank))
    expected = [change(layer) for layer in layers_of(model)]
    for count in range(1, 1001):
        expected = [was + moved for was, moved in zip(expected, move(model))]
        random_gradients(model)
        rescale(model)
        if count in (1, 2, 3, 10, 100, 1000):
            for layer, want in zip(layers_of(model), expected):
                drift, norm = np.linalg.norm(change(layer) - want), float(layer.scalora_norms["default"][1])
                assert drift <= norm + 1e-6 * np.linalg.norm(want)
                assert (norm == 0) == (count * 4 <= rank)
    assert drift > 0.2 * np.linalg.norm(want), "little was truncated"


def test_discarded_is_what_numpy_would_leave_out():
    model = fill_factors(adapted(Chain(3, 14, 18), r=4, accumulator_rank=6))
    for count in range(5):
        move(model)
        random_gradients(model)
        before = [(accumulated(layer), factors_of(layer)) for layer in layers_of(model)]
        norms = [float(layer.scalora_norms["default"][1]) for layer in layers_of(model)]
        report = rescale(model)
        expected = []
        for layer, (held, (B, A)) in zip(layers_of(model), before):
            s = layer.scaling["default"]
            new_B, new_A = factors_of(layer)
            sigma = np.linalg.svd(held + s * B @ A - s * new_B @ new_A, compute_uv=False)
            expected.append(np.linalg.norm(sigma[6:]))
            assert float(layer.scalora_norms["default"][1]) - norms.pop(0) == pytest.approx(
                expected[-1], rel=1e-4, abs=1e-6
            )
        assert report.discarded == pytest.approx(np.linalg.norm(expected), rel=1e-4, abs=1e-6)
        assert (report.discarded > 1e-3) == (count > 0)


@pytest.mark.parametrize("how", SCALINGS)
def test_everything_is_the_same_bits_for_any_power_of_two_on_the_gradients(how):
    """Loss scaling and gradient accumulation without division do not matter."""
    start = fill_factors(adapted(Net(), scaling=how, accumulator_rank=4))
    backward(start)
    grads = [p.grad.clone() for p in trainable(start)]
    expected = None
    for k in [0, *range(-20, 21)]:
        model = copy.deepcopy(start)
        for p, grad in zip(trainable(model), grads):
            p.grad = grad * 2.0**k
        rescale(model)
        result = snapshot(model)
        if expected is None:
            expected = result
            assert not torch.equal(trainable(model)[0], trainable(start)[0])
        for name, value in result.items():
            factor = 2.0**k if name.endswith(".grad") else 1
            assert torch.equal(value, expected[name] * factor), (name, k)


@pytest.mark.parametrize("how", SCALINGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_rounding_takes_from_low_precision_factors_goes_into_the_accumulator(how, dtype):
    """Scaling rounds them by 2^-9 or 2^-12, and yet only the float32 accumulator rounds the function."""
    model = fill_factors(adapted(Net().to(dtype), autocast_adapter_dtype=False, scaling=how))
    for _ in range(3):
        move(model, size=2.0)
        random_gradients(model)
        before = [(change(layer), factors_of(layer)) for layer in layers_of(model)]
        rescale(model)
        for layer, (was, _) in zip(layers_of(model), before):
            assert all(p.dtype == dtype for p in layer.factors("default"))
            assert np.linalg.norm(change(layer) - was) < 1e-6 * np.linalg.norm(accumulated(layer))
    assert any(
        (scales_between(factors, factors_of(layer))[0] != 1).any()
        for layer, (_, factors) in zip(layers_of(model), before)
    )


def test_float64_adapters_are_scaled_as_exactly_as_their_accumulator_allows():
    """Not by powers of two: float64 has no rounding to avoid."""
    model = fill_factors(adapted(Net().double(), autocast_adapter_dtype=False))
    random_gradients(model)
    before = [(change(layer), factors_of(layer)) for layer in layers_of(model)]
    rescale(model)
    for layer, (was, factors) in zip(layers_of(model), before):
        assert all(p.dtype == torch.float64 for p in layer.factors("default"))
        alpha, _ = scales_between(factors, factors_of(layer))
        assert np.abs(np.log2(alpha) - np.round(np.log2(alpha))).max() > 1e-3
        assert np.linalg.norm(change(layer) - was) < 1e-6 * np.linalg.norm(was)


# The whole algorithm


def algorithm_pair(how, interval, seed, steps, monkeypatch, optimizer, dtype, schedule, **config):
    """Train one layer with the package and with the transcription; yields both after every step."""
    monkeypatch.setattr(scaling, "MIN_COLUMN_NORM", 0.0)  # the paper has no floor
    m, n, r, eta, weight_decay = 9, 7, 2, 5e-3, 0.1 if optimizer == "AdamW" else 0.0
    rng = np.random.default_rng(seed)
    x, W = rng.standard_normal((40, n)), rng.standard_normal((m, n)) / 3
    y = x @ (W + rng.standard_normal((m, n)) / 3).T
    net = Chain(1, n, m)
    net.layers[0].weight.data = torch.tensor(W)
    s = 2.5 / r
    L = 3 / (eta * s**2)
    model = adapted(
        net.to(dtype), r=r, lora_alpha=2.5, scaling=how, scaling_interval=interval, smoothness=L, **config
    )  # fmt: skip
    (layer,) = layers_of(model)
    lora_A = layer.factors("default")[1]
    torch.manual_seed(seed)
    nn.init.normal_(lora_A, std=0.2)
    method = getattr(torch.optim, optimizer)(trainable(model), lr=eta, weight_decay=weight_decay)
    rates = torch.optim.lr_scheduler.LambdaLR(method, schedule)
    oracle = reference.ReferenceScaLoRA(
        layer.get_base_layer().weight.detach().numpy(), np.zeros((m, r)), lora_A.detach().numpy().T,
        lambda weight: (x @ weight.T - y).T @ x / len(x),
        s=s, L=L, eta=eta, mode=how, interval=interval, weight_decay=weight_decay,
    )  # fmt: skip
    base = layer.get_base_layer().weight.detach().double().numpy().copy()
    tx, ty = torch.tensor(x, dtype=dtype), torch.tensor(y, dtype=dtype)
    for _ in range(steps):
        model.zero_grad()
        ((model(tx) - ty).square().sum() / 2 / len(x)).backward()
        oracle.step(rates.get_last_lr()[0])
        method.step()
        rates.step()
        yield layer, oracle, base, last_report(method)


def assert_close(a, b, tolerance):
    assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)


@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize("how", SCALINGS)
@pytest.mark.parametrize("config", [{"accumulator": "dense"}, {"accumulator_rank": 7}], ids=["dense", "factored"])
@pytest.mark.parametrize("optimizer", ["Adam", "AdamW"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.float64, 1e-6)], ids=str)
def test_the_algorithm_step_by_step(dtype, tolerance, optimizer, config, how, interval, monkeypatch):
    """Weight and factors after each of 20 steps, with a warmup, against the paper in float64."""
    seed, used, scaled = {"column": 3, "scalar": 0, "exact": 1}[how], [], 0

    def warmup(step):
        return min(1.0, (step + 1) / 8)

    run = algorithm_pair(how, interval, seed, 20, monkeypatch, optimizer, dtype, warmup, **config)
    for step, (layer, oracle, base, report) in enumerate(run, start=1):
        lora_B, lora_A = factors_of(layer)
        assert_close(base + change(layer), oracle.weight, tolerance / 10)
        assert_close(lora_B, oracle.A, tolerance)
        assert_close(lora_A.T, oracle.B, tolerance)
        if step % interval == 0:
            assert min(oracle.alpha.min(), oracle.beta.min()) > 1e-3, "choose a seed where the paper zeroes nothing"
            used.append(oracle.used)
            assert (report.column, report.scalar, report.exact) == tuple(oracle.used == rule for rule in SCALINGS)
            scaled += np.abs(np.log(oracle.alpha)).max() > 0.01
        assert layer.progress("default").rescalings == step // interval
    assert scaled >= 4
    assert np.linalg.norm(accumulated(layer)) > 0.02 * np.linalg.norm(change(layer)), "little was folded"
    if how == "column" and interval == 1:
        assert set(used) == {"column", "scalar"}


# When it happens


def rescalings(model):
    return [layer.progress("default").rescalings for layer in layers_of(model)]


@pytest.mark.parametrize("interval", [1, 3, 10])
def test_every_interval_of_optimizer_steps(interval):
    model = adapted(Net(), scaling_interval=interval)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-3)
    assert last_report(optimizer) is None
    for step in range(1, 22):
        train(model, optimizer, 1)
        assert rescalings(model) == [step // interval] * 3
    report = last_report(optimizer)
    assert report.layers == 3 and report.skipped == 0


def test_micro_steps_of_gradient_accumulation_do_not_count():
    model = adapted(Net(), scaling_interval=2)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-3)
    for micro_step in range(1, 17):
        (model(X) - Y).square().mean().backward()
        if micro_step % 4 == 0:
            optimizer.step()
            optimizer.zero_grad()
        assert rescalings(model) == [micro_step // 8] * 3


def test_two_optimizers_rescale_what_they_step():
    model = adapted(Net(), scaling_interval=2)
    first, second, last = layers_of(model)
    one = torch.optim.AdamW([*first.factors("default"), *last.factors("default")], lr=1e-3)
    two = torch.optim.SGD(second.factors("default"), lr=1e-3, momentum=0.9)
    for step in range(1, 7):
        backward(model)
        one.step()
        if step % 3 == 0:
            two.step()
        assert rescalings(model) == [step // 2, step // 6, step // 2]
    assert last_report(one).layers == 2 and last_report(two).layers == 1


def test_factors_of_different_optimizers_and_frozen_factors_are_left_alone():
    """A rescaling has to carry the moments of both factors in one go."""
    model = adapted(Net(), scaling_interval=1)
    for layer in layers_of(model)[:2]:
        layer.factors("default")[1].requires_grad_(False)
    lora_B, lora_A = layers_of(model)[2].factors("default")
    optimizers = [torch.optim.SGD([*(layer.factors("default")[0] for layer in layers_of(model)[:2]), lora_B], lr=1e-3)]
    optimizers.append(torch.optim.SGD([lora_A], lr=1e-3))
    frozen = layers_of(model)[0].factors("default")[1].detach().clone()
    for _ in range(3):
        backward(model)
        for optimizer in optimizers:
            optimizer.step()
    assert rescalings(model) == [0, 0, 0]
    backward(model)
    assert rescale(model).layers == 1
    assert torch.equal(layers_of(model)[0].factors("default")[1], frozen)


def plain_adam(params, grads, steps):
    """Adam by hand, for what the hook must not touch."""
    first, second = ([torch.zeros_like(p) for p in params] for _ in range(2))
    for t in range(1, steps + 1):
        for p, g, m, v in zip(params, grads[t - 1], first, second):
            m.mul_(0.9).add_(0.1 * g)
            v.mul_(0.999).add_(0.001 * g * g)
            p.sub_(1e-2 * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8))
    return params


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_model_without_scalora_is_untouched(kind):
    """Beside a ScaLoRA model that is alive, so that the hook has something to look for."""
    bystander = adapted(Net(), scaling_interval=1)
    net = Net()
    if kind == "lora":
        net = get_peft_model(net, LoraConfig(r=3, target_modules=["first", "second"]))
    params = trainable(net)
    start, grads = [p.detach().double().clone() for p in params], []
    optimizer = torch.optim.Adam(params, lr=1e-2)
    saved = snapshot(bystander)
    for _ in range(5):
        backward(net)
        grads.append([p.grad.double().clone() for p in params])
        optimizer.step()
        assert all(torch.equal(p.grad.double(), g) for p, g in zip(params, grads[-1]))
    for p, want in zip(params, plain_adam(start, grads, 5)):
        torch.testing.assert_close(p.double(), want, rtol=1e-5, atol=1e-6)
    assert all(same(value, saved[name]) for name, value in snapshot(bystander).items())
    assert last_report(optimizer) is None


def test_one_model_of_two_that_share_an_optimizer():
    models = [fill_factors(adapted(Net())) for _ in range(2)]
    optimizer = torch.optim.AdamW([p for model in models for p in trainable(model)], lr=1e-3)
    for model in models:
        backward(model)
    saved = [snapshot(model) for model in models]
    assert rescale(models[0], optimizer).layers == 3
    changed = [
        [not torch.equal(value, old[name]) for name, value in snapshot(model).items()]
        for model, old in zip(models, saved)
    ]
    assert any(changed[0]) and not any(changed[1])


def test_only_the_adapter_that_is_trained():
    model = adapted(Net(), scaling_interval=1)
    model.add_adapter("other", ScaLoRAConfig(r=2, scaling_interval=1, target_modules=["first", "second", "last"]))
    model.set_adapter("other")
    saved = {name: value for name, value in snapshot(model).items() if ".default." in name}
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-3)
    train(model, optimizer, 3)
    assert [layer.progress("other").rescalings for layer in layers_of(model)] == [3, 3, 3]
    now = snapshot(model)
    assert saved and all(same(value, now[name]) for name, value in saved.items())


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_gradient_scaler_skips(fused):
    """Without `fused` the optimizer is not called at all; with it the hook runs, on gradients that are still scaled."""
    model = adapted(Net(), scaling_interval=2)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-3, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

    def step(overflow):
        optimizer.zero_grad()
        scaler.scale((model(X) - Y).square().mean()).backward()
        if overflow:
            for p in trainable(model):
                p.grad.fill_(math.inf)
        scaler.step(optimizer)
        scaler.update()

    step(False)
    assert rescalings(model) == [0, 0, 0]
    before, factors = model(X).detach(), [p.detach().clone() for p in trainable(model)]
    step(True)
    assert scaler.get_scale() == 2.0**9
    assert all(torch.equal(p, q) for p, q in zip(trainable(model), factors))
    assert torch.equal(model(X), before)
    if not fused:
        assert [layer.progress("default").steps for layer in layers_of(model)] == [1, 1, 1]
    for _ in range(4):
        step(False)
    assert all(count >= 2 for count in rescalings(model))
    assert all(p.isfinite().all() for p in trainable(model))
    assert last_report(optimizer).skipped == 0


def test_accelerate():
    """Accelerate wraps the optimizer that holds the state."""
    accelerator = Accelerator(cpu=True)
    model = adapted(Net(), scaling_interval=2)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(trainable(model), lr=1e-2))
    for _ in range(4):
        optimizer.zero_grad()
        accelerator.backward((model(X) - Y).square().mean())
        optimizer.step()
    assert rescalings(model) == [2, 2, 2]
    assert last_report(optimizer).layers == 3
    accelerator.backward((model(X) - Y).square().mean())
    state = optimizer.optimizer.state[layers_of(model)[0].factors("default")[1]]["exp_avg"]
    was = state.clone()
    assert rescale(model, optimizer).layers == 3
    assert not torch.equal(state, was)


class Wrapper(torch.optim.Optimizer):
    """An optimizer that steps another one, as Lookahead and ZeroRedundancyOptimizer do: both run step hooks."""

    def __init__(self, inner):
        super().__init__(inner.param_groups, {})
        self.inner = inner

    def step(self, closure=None):
        self.inner.step()


@pytest.mark.parametrize("interval", [1, 2, 3])
def test_an_optimizer_inside_another_counts_once(interval):
    """And it is the inner one, which holds the moments, that has to be rescaled with."""
    start, results = adapted(Net(), scaling_interval=interval), []
    for wrap in (lambda optimizer: optimizer, Wrapper):
        model = copy.deepcopy(start)
        train(model, wrap(torch.optim.AdamW(trainable(model), lr=1e-2)), 9)
        assert rescalings(model) == [9 // interval] * 3
        results.append(snapshot(model))
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


def test_gradients_that_only_a_closure_computes_are_not_steps(tmp_path):
    """The hook runs before the closure and finds none; saving then has to say that nothing was rescaled."""
    model = adapted(Net(), scaling_interval=1)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        optimizer.step(lambda: backward(model))
        optimizer.zero_grad()
    assert rescalings(model) == [0, 0, 0]
    with pytest.warns(UserWarning, match="trained but never rescaled"):
        model.save_pretrained(tmp_path)


def test_a_closure_that_leaves_its_gradients_for_the_next_step():
    """Scales from the gradients of the step before are late, but the function and the moments stay right."""
    model = adapted(Net(), scaling_interval=2)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    train(model, optimizer, 5)
    optimizer.param_groups[0].update(lr=0.0, weight_decay=0.0)
    before, count = model(X).detach(), rescalings(model)[0]
    for _ in range(6):
        optimizer.step(lambda: backward(model))
    assert rescalings(model) == [count + 3] * 3
    assert relative(model(X).detach(), before) < 1e-5


# Gradients that say nothing


def spoiled(kind, model):
    """Make the gradients of the first layer useless; returns the expected number of skipped layers."""
    lora_B, lora_A = layers_of(model)[0].factors("default")
    if kind == "nan":
        lora_A.grad[1, 2] = math.nan
    elif kind == "inf":
        lora_B.grad[3, 1] = -math.inf
    elif kind == "zero":
        lora_A.grad.zero_()
        lora_B.grad.zero_()
    elif kind == "missing":
        lora_A.grad = None
    elif kind == "both missing":
        lora_A.grad = lora_B.grad = None
    elif kind == "nan factor":
        lora_B.data[2, 0] = math.nan
        lora_B.grad.fill_(math.nan)
        lora_A.grad.fill_(math.nan)


@pytest.mark.parametrize("name", ["AdamW", "SGD momentum", "bnb AdamW32bit", "bnb AdamW8bit"])
@pytest.mark.parametrize(
    "config", [{"accumulator": "dense"}, {}, {"accumulator_rank": 4}], ids=["dense", "room", "full"]
)
@pytest.mark.parametrize("kind", ["nan", "inf", "zero", "missing", "both missing", "nan factor"])
def test_a_layer_without_a_usable_gradient_is_skipped_alone(kind, config, name):
    """Its parameters, gradients, accumulator and optimizer state keep their bits; its neighbours are rescaled."""
    model = fill_factors(adapted(Net(), scaling_interval=3, **config))
    optimizer = make(name, trainable(model))
    train(model, optimizer, 4)  # one rescaling, so that the accumulator is not empty
    move(model)
    first, second, last = layers_of(model)
    assert np.linalg.norm(accumulated(first)) > 0
    backward(model)
    spoiled(kind, model)
    saved, held, old = snapshot(model, optimizer), accumulated(first), [factors_of(layer) for layer in (second, last)]
    report = rescale(model, optimizer)
    assert (report.layers, report.skipped) == (3, 1)
    assert report.column + report.scalar == 2
    assert report.fold_error < 1e-6 and math.isfinite(report.discarded) and math.isfinite(report.median_log_alpha)
    for key, value in snapshot(model, optimizer).items():
        if ".first." in key and "progress" not in key:
            assert same(value, saved[key]), key
    np.testing.assert_array_equal(accumulated(first), held)
    for layer, factors in zip((second, last), old):
        assert not np.allclose(scales_between(factors, factors_of(layer))[0], 1, atol=0.01)


def test_training_goes_on_after_a_layer_was_skipped():
    """Layers of one shape that were skipped at different times still end in accumulators that are right."""
    model = fill_factors(adapted(Net(), scaling_interval=NEVER, accumulator_rank=7))
    for count in range(12):
        move(model)
        random_gradients(model)
        before = [change(layer) for layer in layers_of(model)]
        norms = [float(layer.scalora_norms["default"][1]) for layer in layers_of(model)]
        if count % 3 == 0:
            spoiled("nan", model)
        if count % 4 == 0:
            layers_of(model)[count // 4 % 2].factors("default")[0].grad = None
        rescale(model)
        for layer, was, norm in zip(layers_of(model), before, norms):
            new = float(layer.scalora_norms["default"][1]) - norm
            assert np.linalg.norm(change(layer) - was) <= new * (1 + 1e-5) + 1e-5 * np.linalg.norm(was)


def test_no_gradient_at_all():
    model = adapted(Net())
    optimizer = torch.optim.AdamW(trainable(model))
    saved = snapshot(model)
    for report in (rescale(model, optimizer), rescale(model)):
        assert (report.layers, report.skipped, report.column, report.scalar, report.exact) == (3, 3, 0, 0, 0)
        assert (report.fold_error, report.discarded, report.median_log_alpha) == (0, 0, 0)
    assert all(same(value, saved[name]) for name, value in snapshot(model).items())


# Learning rates


def expected_scales(layer, factors, G, how, L, eta_B, eta_A):
    """α with the rate of lora_A, β with that of lora_B, by the transcription; u itself has no rate in it."""
    B, A = factors
    s = layer.scaling["default"]

    def both(eta):
        scales = reference.column_scaling(B, A.T, G, L, eta, s) if how == "column" else None
        rule = reference.exact_scaling if how == "exact" else reference.scalar_scaling
        return scales or rule(B, A.T, G, L, eta, s)

    return both(eta_A)[0], both(eta_B)[1]


def set_gradients(layer, G):
    lora_B, lora_A = layer.factors("default")
    s = layer.scaling["default"]
    lora_B.grad = (s * torch.tensor(G) @ lora_A.detach().double().T).float()
    lora_A.grad = (s * lora_B.detach().double().T @ torch.tensor(G)).float()


@pytest.mark.parametrize("how", SCALINGS)
@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("eta_B, eta_A", [(2e-3, 2e-3), (3.2e-2, 2e-3)], ids=["one rate", "LoRA+"])
def test_smoothness_goes_with_the_base_learning_rate_of_each_factor(eta_B, eta_A, scheduled, how, monkeypatch):
    """In the middle of a warmup the scheduled rate is a tenth of it. LoRA+ gives lora_B a rate of its own.

    s is the scale that the adapter has now, not the configured one.
    """
    monkeypatch.setattr(scaling, "MIN_COLUMN_NORM", 0.0)
    L = 123.0
    model = fill_factors(adapted(Chain(1, 8, 10), scaling=how, smoothness=L))
    (layer,) = layers_of(model)
    layer.set_scale("default", 0.6)
    lora_B, lora_A = layer.factors("default")
    optimizer = torch.optim.AdamW([{"params": [lora_B], "lr": eta_B}, {"params": [lora_A], "lr": eta_A}])
    if scheduled:
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.1)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * eta_B)
    G = np.random.default_rng(5).standard_normal((10, 8))
    set_gradients(layer, G)
    before = factors_of(layer)
    rescale(model, optimizer)
    expected = expected_scales(layer, before, G, how, L, eta_B, eta_A)
    for got, want in zip(scales_between(before, factors_of(layer)), expected):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * want.max())


def test_auto_smoothness_keeps_the_norm_of_the_initialised_factor(monkeypatch):
    """1 / (L η s²) is the mean squared column norm of lora_A at the start, whatever the rate and its present norm."""
    monkeypatch.setattr(scaling, "MIN_COLUMN_NORM", 0.0)
    model = adapted(Chain(1, 8, 10))
    (layer,) = layers_of(model)
    target2 = np.mean(np.sum(factors_of(layer)[1] ** 2, axis=1))
    fill_factors(model, size=3.0)
    with torch.no_grad():
        layer.factors("default")[1].mul_(7)
    optimizer = torch.optim.AdamW(trainable(model), lr=0.3)
    G = np.random.default_rng(5).standard_normal((10, 8))
    set_gradients(layer, G)
    before, s = factors_of(layer), layer.scaling["default"]
    rescale(model, optimizer)
    expected = expected_scales(layer, before, G, "column", 1 / (target2 * s**2), 1.0, 1.0)
    for got, want in zip(scales_between(before, factors_of(layer)), expected):
        np.testing.assert_allclose(got, want, rtol=1e-4)


# The report


def test_the_report():
    """Its counts against the transcription's branches, its median against NumPy, of two scalings in one model."""
    model = fill_factors(adapted(Chain(9, 8, 10), r=4))
    layers = layers_of(model)
    for layer in layers[6:]:
        layer.scalora_config = {"default": copy.copy(layer.scalora_config["default"])}
        layer.scalora_config["default"].scaling = "exact"
    rng = np.random.default_rng(0)
    expected = {"column": 0, "scalar": 0, "exact": 2}
    for k, layer in enumerate(layers):
        G = rng.standard_normal((10, 8))
        set_gradients(layer, G)
        B, A = factors_of(layer)
        if k < 5:
            expected["scalar" if reference.column_scaling(B, A.T, G, 1, 1, 1) is None else "column"] += 1
    layers[5].factors("default")[0].grad = None
    layers[8].factors("default")[0].grad.zero_()
    layers[8].factors("default")[1].grad.zero_()
    before = [factors_of(layer) for layer in layers]
    report = rescale(model)
    assert {rule: getattr(report, rule) for rule in SCALINGS} == expected
    assert min(expected.values()) > 0
    assert (report.layers, report.skipped) == (9, 2)
    logs = [
        np.abs(np.log(scales_between(b, factors_of(layer))[0]))
        for k, (b, layer) in enumerate(zip(before, layers))
        if k not in (5, 8)
    ]
    assert report.median_log_alpha == pytest.approx(np.median(np.concatenate(logs)), rel=1e-4)
    assert report.median_log_alpha > 0.05


@pytest.mark.parametrize("accumulator", ["dense", "factored"])
def test_fold_error_is_what_rounding_did(accumulator):
    model = fill_factors(adapted(Chain(4, 8, 10), r=4, accumulator=accumulator))
    random_gradients(model)
    before = [(change(layer), factors_of(layer)) for layer in layers_of(model)]
    report = rescale(model)
    errors = [
        np.linalg.norm(change(layer) - was) / np.linalg.norm(layer.scaling["default"] * B @ A)
        for layer, (was, (B, A)) in zip(layers_of(model), before)
    ]
    assert 1e-9 < max(errors) < 1e-6
    assert report.fold_error == pytest.approx(max(errors), rel=0.5, abs=2e-8)


def test_the_report_can_be_read():
    model = fill_factors(adapted(Net()))
    backward(model)
    report = rescale(model)
    for figure in ("layers=3", "column=", "skipped=0", "fold_error="):
        assert figure in repr(report)


# Errors


def test_a_model_without_scalora_layers_is_refused():
    with pytest.raises(ValueError, match=r"model has no ScaLoRA layer: build it with get_peft_model"):
        rescale(get_peft_model(Net(), LoraConfig(target_modules=["first"])))


@pytest.mark.parametrize("rate", [None, 0.0])
def test_numeric_smoothness_needs_a_learning_rate(rate):
    model = fill_factors(adapted(Net(), smoothness=5.0))
    backward(model)
    optimizer = None if rate is None else torch.optim.SGD(trainable(model), lr=rate)
    with pytest.raises(ValueError, match=r"smoothness=5\.0 needs a learning rate above 0: pass the optimizer"):
        rescale(model, optimizer)


@pytest.mark.parametrize(
    "optimizer, states",
    [(torch.optim.Adadelta, "'square_avg', 'acc_delta' of optimizer Adadelta"),
     (torch.optim.Adafactor, "'row_var', 'col_var' of optimizer Adafactor")],
)  # fmt: skip
def test_unknown_optimizer_state_stops_the_training(optimizer, states):
    model = adapted(Net(), scaling_interval=NEVER)
    optimizer = optimizer(trainable(model))
    train(model, optimizer, 1)
    saved = snapshot(model)
    with pytest.raises(TypeError, match=states):
        train(model, optimizer, 1)
    with pytest.raises(TypeError, match=states):
        rescale(model, optimizer)
    assert all(
        same(value, saved[name])
        for name, value in snapshot(model).items()
        if "progress" not in name and "grad" not in name
    )
