"""ReLoRA against the algorithm written out in float64, and what a restart changes and leaves."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers_eval import run
from helpers_models import Linears, floats
from peft import LoraConfig, get_peft_model
from transformers import get_constant_schedule_with_warmup

from eval.baselines.relora import MERGED_NAME, ReLoRACallback, jagged

R, S, PERIOD, STEPS, RATE = 2, 1.5, 4, 14, 1e-2
LAYERS = ("lin0", "lin1")


class Loop:
    """A training loop that calls the callback as Trainer does."""

    def __init__(self, folder, step=0, steps=STEPS):
        torch.manual_seed(0)
        base = Linears()
        self.initial = {name: base.get_submodule(name).weight.detach().double().clone() for name in LAYERS}
        self.bias = {name: base.get_submodule(name).bias.detach().double() for name in LAYERS}
        self.model = get_peft_model(base, LoraConfig(r=R, lora_alpha=3, target_modules=list(LAYERS)))
        self.callback = ReLoRACallback(self.model, PERIOD, warmup_steps=2)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
        self.schedule = get_constant_schedule_with_warmup(self.optimizer, 2)
        self.arguments = SimpleNamespace(output_dir=str(folder))
        self.state = SimpleNamespace(global_step=step, max_steps=steps, is_world_process_zero=True)
        self.callback.on_train_begin(self.arguments, self.state, None, lr_scheduler=self.schedule)

    def step(self):
        self.optimizer.zero_grad()
        (self.model(inputs()) - target(self.state.global_step)).square().mean().backward()
        self.optimizer.step()
        self.schedule.step()
        self.state.global_step += 1

    def end_step(self):
        self.callback.on_step_end(self.arguments, self.state, None, optimizer=self.optimizer)

    def layers(self):
        return {name: self.model.base_model.model.get_submodule(name) for name in LAYERS}

    def base_change(self, name):
        return self.layers()[name].get_base_layer().weight.detach().double() - self.initial[name]


def inputs():
    return floats(5, 14)


def target(step):
    return torch.randn(5, 10, generator=torch.Generator().manual_seed(step))


def factors(layer):
    return {"A": layer.lora_A["default"].weight, "B": layer.lora_B["default"].weight}


def keep_largest(mean, square):
    """Both moments with all entries zero but the largest of every hundred begun, by the first."""
    kept = mean.flatten().abs().argsort()[int(0.99 * mean.numel()) :]
    results = []
    for moment in (mean, square):
        flat = torch.zeros(mean.numel(), dtype=mean.dtype)
        flat[kept] = moment.flatten()[kept]
        results.append(flat.reshape(mean.shape))
    return results


def test_it_is_the_algorithm_in_float64(tmp_path):
    loop = Loop(tmp_path)
    W = {name: weight.clone() for name, weight in loop.initial.items()}
    F = {(n, k): p.detach().double().clone() for n, layer in loop.layers().items() for k, p in factors(layer).items()}
    mean = {key: torch.zeros_like(value) for key, value in F.items()}
    square = {key: torch.zeros_like(value) for key, value in F.items()}
    for t in range(STEPS):
        loop.step()
        leaves = {key: value.clone().requires_grad_() for key, value in F.items()}
        x = inputs().double()
        for name in LAYERS:
            x = x @ (W[name] + S * leaves[name, "B"] @ leaves[name, "A"]).T + loop.bias[name]
            x = torch.tanh(x) if name == "lin0" else x
        (x - target(t).double()).square().mean().backward()
        rate = RATE * {0: 0.0, 1: 0.5}.get(t % PERIOD, 1.0)
        for key, leaf in leaves.items():
            mean[key] = 0.9 * mean[key] + 0.1 * leaf.grad
            square[key] = 0.999 * square[key] + 0.001 * leaf.grad**2
            m, v = mean[key] / (1 - 0.9 ** (t + 1)), square[key] / (1 - 0.999 ** (t + 1))
            F[key] = F[key] - rate * m / (v.sqrt() + 1e-8)
        loop.end_step()
        if (t + 1) % PERIOD == 0:
            for name, layer in loop.layers().items():
                W[name] = W[name] + S * F[name, "B"] @ F[name, "A"]
                F[name, "B"] = torch.zeros_like(F[name, "B"])
                F[name, "A"] = factors(layer)["A"].detach().double().clone()  # drawn anew
                for key in ((name, "A"), (name, "B")):
                    mean[key], square[key] = keep_largest(mean[key], square[key])
        for name, layer in loop.layers().items():
            close = {"rtol": 1e-4, "atol": 1e-5}
            torch.testing.assert_close(loop.base_change(name), W[name] - loop.initial[name], **close)
            for k, p in factors(layer).items():
                torch.testing.assert_close(p.detach().double(), F[name, k], **close)
                torch.testing.assert_close(loop.optimizer.state[p]["exp_avg"].double(), mean[name, k], **close)
    assert loop.callback.merged


def test_a_restart_leaves_the_function_and_raises_the_rank(tmp_path):
    loop = Loop(tmp_path)
    for t in range(1, STEPS + 1):
        loop.step()
        before = loop.model(inputs())
        A_before = {name: factors(layer)["A"].clone() for name, layer in loop.layers().items()}
        loop.end_step()
        restarts = t // PERIOD
        if t % PERIOD == 0:
            torch.testing.assert_close(loop.model(inputs()), before, rtol=1e-4, atol=1e-5)
            for name, layer in loop.layers().items():
                assert not factors(layer)["B"].any()
                A = factors(layer)["A"]
                assert not torch.isclose(A, A_before[name]).any()
                assert A.abs().max() <= 1 / math.sqrt(A.shape[1])  # Kaiming's bound with a = √5
                kept = loop.optimizer.state[A]["exp_avg"].count_nonzero()
                assert kept == A.numel() - int(0.99 * A.numel())
        ranks = loop.callback.effective_rank(loop.model, tol=1e-4)
        for name, layer in loop.layers().items():
            base_change = loop.base_change(name)
            assert np.linalg.matrix_rank(base_change.numpy(), tol=1e-5) == min(R * restarts, *base_change.shape)
            whole = base_change + S * (factors(layer)["B"] @ factors(layer)["A"]).detach().double()
            sigma = np.linalg.svd(whole.numpy())[1]
            assert ranks[f"base_model.model.{name}"] == (sigma > 1e-4 * sigma[0]).sum()


def test_the_learning_rate_warms_up_in_every_cycle():
    assert [jagged(t, 4, 2) for t in range(9)] == [0, 0.5, 1, 1, 0, 0.5, 1, 1, 0]
    assert [jagged(t, 3, 0) for t in range(4)] == [1, 1, 1, 1]


def test_the_end_of_a_run_is_no_restart(tmp_path):
    loop = Loop(tmp_path, steps=PERIOD)
    for _ in range(PERIOD):
        loop.step()
        loop.end_step()
    assert not loop.callback.merged
    assert all(factors(layer)["B"].any() for layer in loop.layers().values())


@pytest.mark.parametrize("stopped", [PERIOD, PERIOD + 1, 2 * PERIOD, 3 * PERIOD])
def test_a_continued_run_has_the_base_it_had(stopped, tmp_path):
    loop, bases = Loop(tmp_path, steps=3 * PERIOD), {}
    for t in range(1, 3 * PERIOD + 1):
        loop.step()
        loop.end_step()
        bases[t] = {name: layer.get_base_layer().weight.clone() for name, layer in loop.layers().items()}
    again = Loop(tmp_path, step=stopped, steps=3 * PERIOD)
    for name, layer in again.layers().items():
        assert torch.equal(layer.get_base_layer().weight, bases[stopped][name])


def test_the_new_factors_do_not_depend_on_what_was_drawn_before(tmp_path):
    drawn = []
    for name in ("one", "other"):
        loop = Loop(tmp_path / name)
        torch.manual_seed(len(drawn))
        loop.callback.restart(loop.optimizer)
        state = torch.get_rng_state()
        drawn.append([factors(layer)["A"].clone() for layer in loop.layers().values()])
        torch.manual_seed(len(drawn) - 1)
        assert torch.equal(state, torch.get_rng_state())
    assert all(map(torch.equal, *drawn))


def test_without_the_merged_changes_a_checkpoint_is_not_continued(tmp_path):
    def interrupt(model):
        raise InterruptedError

    settings = {"steps": 8, "save_steps": 1}
    with pytest.raises(InterruptedError):
        run("llama", "relora", tmp_path, eval_steps=6, evaluate=interrupt, **settings)
    (tmp_path / "run" / MERGED_NAME).unlink()
    with pytest.raises(FileNotFoundError, match="Delete the folder to train from the start"):
        run("llama", "relora", tmp_path, **settings)
