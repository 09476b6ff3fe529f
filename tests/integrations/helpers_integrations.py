"""Check what every tool's adapter has to be: filled with accumulated change, and the same model as plain LoRA.

As a script, `helpers_integrations.py ADAPTER BASE NEW_FOLDER` checks an adapter of a language model, in a process that
has not trained it.
"""

import subprocess
import sys
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from peft_scalora import export_lora
from peft_scalora.layer import ScaLoRALayer

TOKENS = torch.arange(5, 17).repeat(2, 1)


def check_adapter(adapter, build, plain, inputs) -> None:
    """Check an adapter folder: it adapts what `build` returns, holds accumulated change, and is LoRA once exported.

    Args:
        adapter: the folder that a tool has saved.
        build: returns a new base model.
        plain: a new folder for the export.
        inputs: keyword arguments of the model; its output is a tensor, or has `logits` or a `last_hidden_state`.
    """
    base = outputs(build(), inputs)
    model = PeftModel.from_pretrained(build(), adapter)
    layers = [module for module in model.modules() if isinstance(module, ScaLoRALayer)]
    assert layers
    for layer in layers:
        assert (layer.scalora_U["default"] @ layer.scalora_V["default"]).norm() > 1e-3, "no accumulated change"
    trained = outputs(model, inputs)
    assert (trained - base).abs().max() > 1e-3, "the adapter has learned nothing"
    export_lora(model, plain)
    exported = PeftModel.from_pretrained(build(), plain)
    assert exported.peft_config["default"].peft_type == "LORA"
    assert not any(isinstance(module, ScaLoRALayer) for module in exported.modules())
    assert (outputs(exported, inputs) - trained).abs().max() < 1e-5


@torch.no_grad()
def outputs(model, inputs) -> torch.Tensor:
    result = model.eval()(**inputs)
    return getattr(result, "logits", getattr(result, "last_hidden_state", result))


def check_language_model(adapter, base, plain) -> None:
    """Check an adapter folder of a causal language model that lies in the folder `base`."""
    check_adapter(adapter, lambda: AutoModelForCausalLM.from_pretrained(base), plain, {"input_ids": TOKENS})


def check_language_model_in_a_new_process(adapter, base, plain) -> None:
    """Check such an adapter where nothing of its training is left."""
    command = [sys.executable, __file__, str(adapter), str(base), str(plain)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert result.returncode == 0, result.stdout + result.stderr


if __name__ == "__main__":
    check_language_model(*sys.argv[1:])
