"""Architectures beyond those of the other tests: train, save, load in a fresh process, export and merge each."""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from helpers_architectures import CASES, DTYPES, outputs, read_outputs, train, write
from helpers_models import check_filled, distance

pytestmark = pytest.mark.slow

# Largest difference of outputs, relative to the largest output. In bfloat16 an exported adapter adds its terms in
# another order than the native one, and a merged model has rounded the sum of weights: a few units of 2^-8 per layer.
LOADED = {"float32": 1e-5, "bfloat16": 1e-5}
EXPORTED = {"float32": 1e-5, "bfloat16": 4e-2}
MERGED = {"float32": 1e-5, "bfloat16": 8e-2}
RUNS = [(name, dtype, checks) for name in CASES for dtype in DTYPES for checks in ("plain", "checkpointing")]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Every run's outputs, of the model, of the merged model, and as a fresh process reads its files."""
    root, models, failed = tmp_path_factory.mktemp("architectures"), {}, {}
    for run in RUNS:
        name, dtype, checks = run
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = train(CASES[name], DTYPES[dtype], checks == "checkpointing")
                write(root / " ".join(run), model)
            models[run] = model
        except Exception as error:
            failed[run] = error
    script = Path(__file__).with_name("helpers_architectures.py")
    subprocess.run([sys.executable, str(script), str(root)], check=True)
    return root, models, failed


@pytest.mark.parametrize("run", RUNS, ids=" ".join)
def test_files_and_merged_weights_compute_what_was_trained(run, trained):
    root, models, failed = trained
    if run in failed:
        raise failed[run]
    name, dtype, _ = run
    case, model = CASES[name], models[run]
    check_filled(model)
    expected = outputs(model, case, DTYPES[dtype])
    assert expected.isfinite().all()
    base = outputs(case.base(DTYPES[dtype]), case, DTYPES[dtype])
    assert distance(expected, base) > 0.05, "the adapter has to be part of the test"
    found = read_outputs(root / " ".join(run))
    assert distance(found["adapter"], expected) <= LOADED[dtype]
    assert distance(found["plain"], expected) <= EXPORTED[dtype]
    assert distance(outputs(model.merge_and_unload(), case, DTYPES[dtype]), expected) <= MERGED[dtype]


@pytest.mark.parametrize("name", CASES)
def test_gradient_checkpointing_gives_the_same_adapter(name, trained):
    """To the rounding of six steps of Adam."""
    _, models, failed = trained
    runs = [(name, "float32", checks) for checks in ("plain", "checkpointing")]
    for run in runs:
        if run in failed:
            raise failed[run]
    plain, checked = (dict(models[run].named_parameters()) for run in runs)
    for key, value in plain.items():
        if "lora_" in key and key in checked:
            torch.testing.assert_close(checked[key], value, rtol=1e-3, atol=1e-3)
