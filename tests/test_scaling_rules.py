"""A scaling rule is one entry in one place: here one from outside the package, which never enlarges a column."""

import re
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from helpers_rescale import Chain, adapted, factors_of, fill_factors, layers_of, scales_between, trainable
from test_rescale_algorithm import set_gradients
from test_trainer import config, make_trainer

from peft_scalora import ScaLoRACallback, ScaLoRAConfig, last_report, rescale
from peft_scalora.maths.scaling import SCALINGS, Scaling, column_rule


def smaller_only(problem):
    """Return the squared scales of the column rule, none above 1."""
    scales2_L2r, scaled_by = column_rule(problem)
    return scales2_L2r.clamp(max=1), {"smaller": scaled_by["column"], "smaller, by scalar": scaled_by["scalar"]}


@pytest.fixture
def rule(monkeypatch):
    monkeypatch.setitem(SCALINGS, "smaller", Scaling(smaller_only, initial_norms=2.0))
    return "smaller"


def transcription(B, A, G, target2):
    """α and β of the rule, from the literal transcription of the paper: L η s² = 1 / target²."""
    scales = reference.column_scaling(B, A.T, G, 1 / target2, 1, 1)
    by_column = scales is not None
    scales = scales or reference.scalar_scaling(B, A.T, G, 1 / target2, 1, 1)
    norms = np.linalg.norm(B, axis=0), np.linalg.norm(A, axis=1)
    floors = [np.minimum(0.1 * np.sqrt(target2) / norm, 1) for norm in norms]
    return [np.maximum(np.minimum(x, 1), floor) for x, floor in zip(scales, floors)], by_column


@pytest.mark.parametrize("smoothness", ["auto", 3.0])
def test_a_rule_from_outside_scales_as_it_says(rule, smoothness):
    """By the rule's own target with "auto", by the smoothness constant L and the learning rate with a number."""
    torch.manual_seed(0)
    model = fill_factors(adapted(Chain(8, 8, 10), r=3, scaling=rule, smoothness=smoothness), size=0.3)
    optimizer = torch.optim.SGD(trainable(model), lr=0.05)
    rng, cases = np.random.default_rng(0), []
    for layer in layers_of(model):
        G = rng.standard_normal((10, 8))
        set_gradients(layer, G)
        cases.append((layer, factors_of(layer), G))
    report = rescale(model, optimizer)
    shrunk = kept = by_column = 0
    for layer, before, G in cases:
        initial = float(layer.scalora_norms["default"][0])
        target2 = 2 * initial if smoothness == "auto" else 1 / (smoothness * 0.05 * layer.scaling["default"] ** 2)
        expected, used_column = transcription(*before, G, target2)
        by_column += used_column
        for got, want in zip(scales_between(before, factors_of(layer)), expected):
            np.testing.assert_allclose(got, want, rtol=1e-4)
            shrunk += (want < 1).sum()
            kept += (want == 1).sum()
    assert shrunk and kept, "one side of the rule is not tested"
    assert report.counts["smaller"] == by_column
    assert report.counts["smaller"] + report.counts["smaller, by scalar"] == report.layers == 8
    assert (report.column, report.scalar, report.exact, report.skipped) == (0, 0, 0, 0)
    assert f"smaller={by_column}" in repr(report)


def test_a_rule_from_outside_trains(rule):
    torch.manual_seed(0)
    model = adapted(Chain(3, 12, 12), scaling=rule, scaling_interval=1)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    x, y = torch.randn(32, 12), torch.randn(32, 12)
    before = (model(x) - y).square().mean()
    for _ in range(20):
        model.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
    assert (model(x) - y).square().mean() < before
    assert last_report(optimizer).counts["smaller"] + last_report(optimizer).counts["smaller, by scalar"] == 3
    assert last_report(optimizer).fold_error < 1e-6


def test_the_callback_logs_the_labels_of_a_rule_from_outside(rule, tmp_path):
    trainer = make_trainer(
        tmp_path, callbacks=[ScaLoRACallback(plot=False)], peft_config=config(scaling=rule), max_steps=6
    )
    trainer.train()
    figures = [entry for entry in trainer.state.log_history if "scalora/smaller" in entry]
    shares = [figures[0][f"scalora/{label}"] for label in (*SCALINGS, "smaller, by scalar", "skipped")]
    assert sum(shares) == pytest.approx(1)
    assert figures[0]["scalora/smaller"] > 0


def test_an_unknown_rule_is_refused_with_the_names_of_all(rule):
    names = "'column', 'scalar', 'exact', 'shrink', 'smaller'"
    with pytest.raises(ValueError, match=f"scaling='larger' must be one of {names}"):
        ScaLoRAConfig(scaling="larger")


def test_documentation_names_every_rule():
    row = re.search(r"^\| `scaling` .*$", Path("docs/reference.md").read_text(), re.M).group()
    for name in SCALINGS:
        assert f'"{name}"' in row, "docs/reference.md"
        assert f'"{name}"' in ScaLoRAConfig.__doc__
        assert repr(name) in ScaLoRAConfig.__dataclass_fields__["scaling"].metadata["help"]
