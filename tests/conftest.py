"""No network, one thread, one seed: what every test starts from."""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
# Processes that a test starts find this checkout, and `eval`, which is not installed.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.getenv("PYTHONPATH")]))

import pytest
import torch

SLOW = set(Path(__file__).with_name("slow_tests.txt").read_text().split())


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark the slow tests, and send those that share a fixture of their module to one worker: it is made once."""
    for item in items:
        if f"{item.path.stem}::{getattr(item, 'originalname', item.name)}" in SLOW:
            item.add_marker(pytest.mark.slow)
        definitions = [last for *_, last in item._fixtureinfo.name2fixturedefs.values()]
        if any(definition.scope == "module" for definition in definitions):
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


@pytest.fixture(autouse=True)
def _same_start():
    """Every test has the same random numbers, whatever ran before it, and leaves torch's global settings alone."""
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
