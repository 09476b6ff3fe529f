"""Exported adapters in vLLM itself, on a CPU: `make test-serving` installs it."""

import os
import tempfile
from pathlib import Path
from typing import get_args

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: run `make test-serving`")
# One process and one thread: no cores are bound, and errors are those that were raised.
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}

import torch
from accelerate import Accelerator
from helpers_models import distance, fill, scalora_config, scalora_layers
from helpers_serving import NEW_TOKENS, PROMPTS, WORDS, continuation
from helpers_vllm import LENGTH, MEMORY, SLOTS, TIER, Server
from peft import get_peft_model
from vllm import LLM, SamplingParams
from vllm.config.lora import MaxLoRARanks
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.request import LoRARequest

from peft_scalora import export_lora, lora_state_config, lora_state_dict
from peft_scalora.export.sync import save_lora_adapter
from peft_scalora.files.vllm import MAX_LORA_RANKS

NAMES = (None, "first", "second")


@pytest.fixture(scope="module")
def engine(served) -> LLM:
    """An engine in this process, which is told nothing of a tokenizer."""
    return LLM(
        served.base,
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        enable_lora=True,
        max_loras=SLOTS,
        max_lora_rank=TIER,
        max_model_len=LENGTH,
        kv_cache_memory_bytes=MEMORY,
    )


def generated(engine, prompts, requests) -> list[list[int]]:
    settings = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": prompt} for prompt in prompts]
    results = engine.generate(prompts, settings, lora_request=requests, use_tqdm=False)
    return [list(result.outputs[0].token_ids) for result in results]


def request_for(served, name) -> LoRARequest | None:
    return name and LoRARequest(name, list(served.reports).index(name) + 1, served.exported(name))


def test_adapters_generate_what_this_package_does_and_the_base_what_it_did(served, expected, engine):
    for name in NAMES:
        assert generated(engine, PROMPTS, request_for(served, name)) == expected[name]
    for report in served.reports.values():
        assert (report.rank, report.max_lora_rank) == (19, TIER)


def test_two_adapters_and_the_base_in_one_batch(served, expected, engine):
    prompts = [prompt for _ in NAMES for prompt in PROMPTS]
    requests = [request_for(served, name) for name in NAMES for _ in PROMPTS]
    assert generated(engine, prompts, requests) == [tokens for name in NAMES for tokens in expected[name]]


def test_our_table_of_settings_is_that_of_vllm():
    assert list(MAX_LORA_RANKS) == list(get_args(MaxLoRARanks))


def test_the_adapter_itself_is_refused_by_name(served, engine):
    with pytest.raises(Exception, match="scalora_"):
        engine.llm_engine.add_lora(LoRARequest("saved", 9, served.saved("first")))


def wide_adapter(served):
    """A model with an adapter whose change has a rank above the setting."""
    config = scalora_config(r=4, accumulator_rank=40, target_modules="all-linear", task_type="CAUSAL_LM")
    ids = torch.randint(2, WORDS, (4, 9), generator=torch.Generator().manual_seed(2))
    return fill(get_peft_model(served.model(None), config), inputs=ids, steps=12)


def test_a_rank_above_the_setting_is_refused_as_the_report_says(served, engine, tmp_path):
    model = wide_adapter(served)
    report = export_lora(model, tmp_path / "exact")
    assert report.rank > TIER and report.max_lora_rank == 64
    assert (
        "--max-lora-rank 64" in str(report) and "--max-lora-rank 64" in (tmp_path / "exact" / "README.md").read_text()
    )
    with pytest.raises(Exception, match=f"rank {report.rank} is greater than max_lora_rank {TIER}"):
        engine.llm_engine.add_lora(LoRARequest("wide", 10, report.path))
    # The remedy: the best approximation of a rank that is served.
    fitting = export_lora(model, tmp_path / "fitting", rank=TIER)
    assert fitting.max_lora_rank == TIER
    request = LoRARequest("fitting", 11, fitting.path)
    assert len(generated(engine, PROMPTS, request)) == len(PROMPTS)


def test_vllm_takes_the_state_from_memory(served):
    model = served.model("first")
    helper = PEFTHelper.from_dict(lora_state_config(model).to_dict())
    tensors = lora_state_dict(model)
    loaded = LoRAModel.from_lora_tensors(1, tensors, helper, device="cpu", dtype=torch.float32).loras
    assert helper.r == 19
    for name, layer in scalora_layers(model).items():
        weights = loaded.pop(name.removeprefix("base_model.model."))
        assert distance(weights.scaling * weights.lora_b @ weights.lora_a, layer.get_delta_weight("default")) < 1e-5
    assert not loaded


@pytest.fixture(scope="module")
def server(served):
    # The name of a socket has to be short.
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder), served.base, {name: served.exported(name) for name in served.reports})
        yield server
        server.stop()


def test_the_server_answers_for_the_base_and_each_adapter(expected, server):
    for prompt, *tokens in zip(PROMPTS, *(expected[name] for name in NAMES)):
        assert [server.generated(name or "base", prompt) for name in NAMES] == tokens


def test_the_server_refuses_what_it_cannot_serve(served, server, tmp_path):
    status, text = server.load_adapter("saved", served.saved("first"))
    assert status >= 400 and "scalora_" in text
    report = export_lora(wide_adapter(served), tmp_path / "wide")
    status, text = server.load_adapter("wide", report.path)
    assert status >= 400 and f"rank {report.rank} is greater than max_lora_rank {TIER}" in text


def test_a_policy_is_sent_while_it_trains(served, server, tmp_path):
    """As TRL's asynchronous trainers do: a folder and a name for every version, of one rank from the first on."""
    config = scalora_config(r=4, accumulator_rank=15, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(served.model(None), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-2)
    ids = torch.randint(2, WORDS, (4, 9), generator=torch.Generator().manual_seed(3))
    versions = set()
    for version in range(3):
        for _ in range(3 * version):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        folder = str(tmp_path / f"policy-v{version}")
        save_lora_adapter(model, Accelerator(cpu=True), "default", folder)
        assert server.load_adapter(f"policy-v{version}", folder)[0] == 200
        tokens = server.generated(f"policy-v{version}", PROMPTS[0])
        assert tokens == continuation(model, PROMPTS[0])
        versions.add(tuple(tokens))
    assert len(versions) > 1, "training has to change what is generated"
