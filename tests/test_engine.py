"""How a rescaling runs: as many kernels for any number of layers, no wait for the device, no weight-sized memory."""

import weakref

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import peft_scalora
from peft_scalora import ScaLoRAConfig

# Operations that hand a device value to Python; reading int64 progress counters, which live on the host, is none.
READS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "item"}
NO_KERNEL = {"_unsafe_view", "scalar_tensor", "empty", "promote_types"}  # allocation and host arithmetic


class Recorder(TorchDispatchMode):
    """Counts kernels (operations that compute), notes reads, and tracks the peak of live new memory."""

    def __init__(self):
        super().__init__()
        self.kernels, self.reads = [], []
        self.live = self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        on_host = isinstance(args[0], torch.Tensor) and args[0].dtype == torch.int64 if args else False
        if name in READS and not on_host:
            self.reads.append(name)
        elif not (func.is_view or on_host or name in READS | NO_KERNEL):
            self.kernels.append(name)
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.track(tensor.untyped_storage())
        return out

    def track(self, storage):
        key = storage._cdata
        if key in self.known:
            return
        size = storage.nbytes()
        self.known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self.release, key, size)

    def release(self, key, size):
        self.known.discard(key)
        self.live -= size


def ready_model(layers, width=24, height=40, r=4, **overrides):
    """Layers of one shape with gradients, optimizer state and full accumulators, whose next fold recompresses."""
    torch.manual_seed(0)
    model = nn.Sequential(*[m for _ in range(layers) for m in (nn.Linear(width, height), nn.Linear(height, width))])
    settings = dict(r=r, target_modules=[str(i) for i in range(0, 2 * layers, 2)], accumulator_rank=2 * r)
    settings |= dict(accumulator="factored")  # a merged one writes each base weight, with a kernel of its own
    model = get_peft_model(model, ScaLoRAConfig(**settings | dict(scaling="column", scaling_interval=1) | overrides))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    x = torch.randn(8, width)
    for _ in range(4):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model(x).square().mean().backward()
    return model, optimizer


def record(layers, **overrides):
    model, optimizer = ready_model(layers, **overrides)
    with Recorder() as recorder:
        peft_scalora.rescale(model, optimizer)
    return recorder


@pytest.mark.parametrize("scaling", ["column", "scalar"])
def test_kernels_do_not_depend_on_the_number_of_layers(scaling):
    few, many = record(2, scaling=scaling), record(12, scaling=scaling)
    assert few.kernels == many.kernels
    assert len(few.kernels) > 20


class Block(nn.Module):
    """The four shapes of a Llama block's seven linear layers."""

    def __init__(self, hidden=32, narrow=24, mlp=48):
        super().__init__()
        shapes = ((hidden, hidden),) * 2 + ((hidden, narrow),) * 2 + ((hidden, mlp),) * 2 + ((mlp, hidden),)
        self.layers = nn.ModuleList(nn.Linear(*shape) for shape in shapes)

    def forward(self, x):
        return sum(layer(x[:, : layer.in_features]).square().mean() for layer in self.layers)


def test_kernels_for_each_shape():
    """A recompression frees room for one fold: the kernels of the two rescalings share the bound."""
    config = ScaLoRAConfig(
        r=2,
        accumulator="factored",
        accumulator_rank=16,
        scaling="column",
        scaling_interval=10**9,
        target_modules=r".*layers\.\d",
    )
    model = get_peft_model(nn.ModuleList([Block(), Block()]), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    x, counts = torch.randn(8, 48), []
    for _ in range(12):
        sum(block(x) for block in model.base_model.model).backward()
        with Recorder() as recorder:
            peft_scalora.rescale(model, optimizer)
        counts.append(len(recorder.kernels) / 4)
        nn.Module.zero_grad(model)
        sum(block(x) for block in model.base_model.model).backward()
        optimizer.step()
    assert len(set(counts[-4:])) > 1, "no recompression"
    assert sum(counts[-2:]) / 2 <= 60


@pytest.mark.parametrize("scaling", ["column", "scalar", "exact"])
def test_a_rescaling_reads_no_device_value(scaling):
    recorder = record(3, scaling=scaling)
    assert recorder.kernels and recorder.reads == []


def test_reading_the_report_is_what_waits():
    model, optimizer = ready_model(2)
    with Recorder() as recorder:
        report = peft_scalora.rescale(model, optimizer)
        assert recorder.reads == []
        assert report.fold_error < 1e-6
    assert recorder.reads


def test_no_transient_of_the_size_of_the_weights():
    """Workspace grows with (m + n), not with m n."""
    small, large = record(1, width=128, height=128).peak, record(1, width=512, height=512).peak
    assert large < 4.5 * small
    assert large < 512 * 512 * 4
