"""Make what every server is given, once."""

import pytest
import torch
from helpers_serving import PROMPTS, Served, continuation, make_served


@pytest.fixture(scope="session")
def served(tmp_path_factory) -> Served:
    torch.manual_seed(0)
    return make_served(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="session")
def expected(served) -> dict:
    """By adapter, None for the base: what this package continues each prompt with. All of them differ."""
    found = {}
    for name in (None, "first", "second"):
        model = served.model(name)
        found[name] = [continuation(model, prompt) for prompt in PROMPTS]
    texts = [tuple(tokens) for each in found.values() for tokens in each]
    assert len(set(texts)) == len(texts), "the adapters have to change what is generated"
    return found
