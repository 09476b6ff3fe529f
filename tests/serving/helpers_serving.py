"""A base model and two adapters of accumulated rank on it, as servers find them: folders, and tokens to start from."""

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from helpers_models import fill, scalora_config, tiny_llama
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from peft_scalora import export_lora
from peft_scalora.export.lora import ExportReport

WORDS = 64
PROMPTS = ([5, 6, 7, 8], [40, 3, 22])
NEW_TOKENS = 16


@dataclass(frozen=True)
class Served:
    """Folders of a base model, and of adapters as they were saved and exported."""

    folder: Path
    reports: dict[str, ExportReport]

    @property
    def base(self) -> str:
        return str(self.folder / "base")

    def saved(self, name: str) -> str:
        return str(self.folder / "adapters" / name)

    def exported(self, name: str) -> str:
        return str(self.folder / "exported" / name)

    def model(self, name: str | None) -> PreTrainedModel | PeftModel:
        """Return the base, or this package's own reading of an adapter on it."""
        base = AutoModelForCausalLM.from_pretrained(self.base)
        return (base if name is None else PeftModel.from_pretrained(base, self.saved(name))).eval()


def make_served(folder: Path) -> Served:
    """Train two adapters of rank 4, which end with 15 columns of accumulated change beside it, and export them."""
    # Of heads that vLLM has a kernel for.
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1}
    base = tiny_llama(**sizes, vocab_size=WORDS, max_position_embeddings=128).eval()
    base.save_pretrained(folder / "base")
    served = Served(folder, {})
    for seed, name in enumerate(("first", "second")):
        config = scalora_config(r=4, accumulator_rank=15, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(copy.deepcopy(base), config)
        ids = torch.randint(2, WORDS, (4, 9), generator=torch.Generator().manual_seed(seed))
        fill(model, inputs=ids, steps=8, seed=seed)
        model.save_pretrained(served.saved(name))
        served.reports[name] = export_lora(model, served.exported(name))
    return served


@torch.no_grad()
def continuation(model: torch.nn.Module, prompt: list[int]) -> list[int]:
    """Return the most likely tokens after a prompt, one whole forward pass each: no cache, no generation loop."""
    ids = list(prompt)
    for _ in range(NEW_TOKENS):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]
