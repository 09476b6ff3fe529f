"""Pushing to a stand-in of the hub and loading from it, each in a process of its own, with the real huggingface_hub."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from helpers_adapters import save
from helpers_hub import running_hub
from helpers_models import fill, output, scalora_config, tiny_llama, tokens
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from peft_scalora import export_lora, export_merged
from peft_scalora.export.hub import push_to_hub

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a base model, an adapter trained on it, what that gives as LoRA and merged, and its output."""
    folder = tmp_path_factory.mktemp("hub")
    torch.manual_seed(0)
    tiny_llama().save_pretrained(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    model = fill(
        get_peft_model(base, scalora_config(target_modules="all-linear", task_type="CAUSAL_LM")), "default", tokens()
    )
    save(model, folder / "adapter")
    (folder / "adapter" / "checkpoint-1").mkdir()
    (folder / "adapter" / "checkpoint-1" / "optimizer.pt").write_text("large")
    export_lora(model, folder / "plain")
    export_merged(model, folder / "merged")
    torch.save(output(model, tokens()), folder / "logits.pt")
    return folder


@pytest.fixture
def hub():
    with running_hub() as hub:
        yield hub


PRELUDE = """
import faulthandler
faulthandler.dump_traceback_later(250, exit=True)  # where it hangs, rather than that it does
import torch
import peft_scalora
from helpers_models import output, tokens
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM

def base():
    return AutoModelForCausalLM.from_pretrained({base!r})
"""


def run(hub, home, trained, script):
    """Run a script as on a user's machine, with the stand-in as the hub; what it prints, by line."""
    environment = os.environ | hub.environment(home)
    environment["PYTHONPATH"] = os.pathsep.join([os.path.dirname(__file__), environment.get("PYTHONPATH", "")])
    script = PRELUDE.format(base=str(trained / "base")) + textwrap.dedent(script)
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout.splitlines()


def test_push_and_load(hub, trained, tmp_path):
    """A model and both kinds of exports, by everything that loads an adapter; only files that are wanted."""
    script = f"""
        model = PeftModel.from_pretrained(base(), {str(trained / "adapter")!r})
        model.push_to_hub("me/from-peft")
        peft_scalora.push_to_hub(model, "me/from-model")
        for name in ("adapter", "plain", "merged"):
            peft_scalora.push_to_hub({str(trained)!r} + "/" + name, "me/" + name)
        """
    run(hub, tmp_path / "one", trained, script)
    assert hub.repos["me/adapter"].keys() == {"README.md", "adapter_config.json", WEIGHTS}
    assert {"config.json", "model.safetensors", "README.md"} <= hub.repos["me/merged"].keys()
    for name in ("adapter", "plain", "merged"):
        for file, content in hub.repos[f"me/{name}"].items():
            assert (trained / name / file).read_bytes() == content, file
    for name in ("from-model", "from-peft"):
        assert hub.repos[f"me/{name}"][WEIGHTS] == hub.repos["me/adapter"][WEIGHTS]
    assert "import peft_scalora" in hub.repos["me/from-model"]["README.md"].decode()

    script = f"""
        expected = torch.load({str(trained / "logits.pt")!r})
        carried = base()
        carried.load_adapter("me/adapter")
        models = dict(
            adapter=PeftModel.from_pretrained(base(), "me/adapter"),
            lean=PeftModel.from_pretrained(base(), "me/from-model", low_cpu_mem_usage=True),
            auto=AutoPeftModelForCausalLM.from_pretrained("me/adapter"),
            carried=carried,
            plain=PeftModel.from_pretrained(base(), "me/plain"),
            merged=AutoModelForCausalLM.from_pretrained("me/merged"),
        )
        for name, model in models.items():
            print(name, float((output(model.eval(), tokens()) - expected).abs().max() / expected.abs().max()))
        """
    errors = dict(line.split() for line in run(hub, tmp_path / "two", trained, script))
    assert [float(errors.pop(name)) for name in ("adapter", "lean", "auto", "carried")] == [0.0] * 4
    assert {name: float(error) < 1e-5 for name, error in errors.items()} == {"plain": True, "merged": True}


def test_what_the_hub_holds_is_checked(hub, trained, tmp_path):
    """Also a pickle file that PEFT would fetch, a rank that it would allocate, and the right to write."""
    files = {name: (trained / "adapter" / name).read_bytes() for name in ("adapter_config.json", WEIGHTS)}
    hub.repos["me/pickled"] = {"adapter_config.json": files["adapter_config.json"], "adapter_model.bin": b"anything"}
    huge = json.loads(files["adapter_config.json"]) | {"r": 10**12}
    hub.repos["me/huge"] = files | {"adapter_config.json": json.dumps(huge).encode()}
    script = f"""
        for act in (
            lambda: PeftModel.from_pretrained(base(), "me/pickled"),
            lambda: PeftModel.from_pretrained(base(), "me/huge"),
            lambda: peft_scalora.push_to_hub({str(trained / "adapter")!r}, "me/stolen", token="hf_wrong"),
        ):
            try:
                act()
            except (ValueError, OSError) as error:
                print(type(error).__name__, str(error).replace("\\n", " "))
        """
    pickled, huge, stolen = run(hub, tmp_path, trained, script)
    assert pickled.startswith(f"ValueError me/pickled has no {WEIGHTS}, the only format")
    assert "r=1000000000000 is above every dimension" in huge
    assert "401" in stolen and "me/stolen" not in hub.repos
    assert not any("adapter_model.bin" in request for request in hub.requests)


def test_what_is_no_adapter_is_not_pushed(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no adapter_config\.json"):
        push_to_hub(tmp_path, "me/nothing")
    model = tiny_llama()
    model.add_adapter(scalora_config(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"a PeftModel or a folder, not LlamaForCausalLM: call model\.save_pretrained"):
        push_to_hub(model, "me/carried")
