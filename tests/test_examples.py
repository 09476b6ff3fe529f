"""The examples: each has all that it imports from the package and from its neighbours."""

import importlib
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.py")))
def test_it_imports(name, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    importlib.import_module(name)
