"""Model cards of saved adapters, exported adapters and merged models."""

from __future__ import annotations

import json
import os
import re
from typing import TYPE_CHECKING

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id

from ..version import install_command
from . import fingerprint
from .atomic import replace_file
from .checkpoints import last_complete_checkpoint
from .checks import accumulator_rank
from .vllm import max_lora_rank

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig

_UNFILLED = "[More Information Needed]"
_UNTITLED = "# Model Card for Model ID"
_TITLE = "# ScaLoRA adapter"
_VERSIONS = "### Framework versions"
_METRICS = ("loss", "train_loss", "step", "eval_", "test_")
_TIMINGS = ("_runtime", "_per_second")
_HEADING = "## Loading this ScaLoRA adapter"
_END = "`peft-scalora export path/to/this/folder path/to/plain_lora`."
_NOTE = """{heading}

Trained with ScaLoRA (r={config.r}, scaling={config.scaling!r}, rescaled every {config.scaling_interval} steps). The
rank of its weight change can exceed r; `peft-scalora info path/to/this/folder` tells by how much. Install peft-scalora,
then import it before loading:

```python
# {install}
import peft_scalora
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "path/to/this/folder")
```

{facts}

Without the package PEFT stops with `KeyError: 'SCALORA'`. To serve the adapter without the package, turn it into a
plain LoRA folder once: {end}
"""


def write_note(folder: str, config: LoraConfig) -> None:
    """Put the note into the card of a saved adapter, in the place of an older one; the rest is not ours."""
    folders = [folder]
    # Of an adapter that is not called "default", PEFT writes the card into the folder above.
    above = os.path.dirname(os.path.abspath(folder))
    if "library_name: peft" not in _read_card(folder) and "library_name: peft" in _read_card(above):
        folders.append(above)
    facts = _table(
        ("method", "ScaLoRA, [arXiv 2510.23818](https://arxiv.org/abs/2510.23818)"),
        *facts_of(config),
        ("results", format_results(results_of(folder))),
    )
    note = _NOTE.format(heading=_HEADING, end=_END, config=config, facts=facts, install=install_command())
    for each in folders:
        before, _, rest = _read_card(each).partition(_HEADING)
        _, _, after = rest.partition(_END)
        kept = without_empty_sections(before), without_empty_sections(after)
        card = "\n\n".join(part.strip() for part in kept if part.strip())
        replace_file(os.path.join(each, "README.md"), f"{card}\n\n{note}".lstrip())


def _without_unfilled_lines(block: str) -> str:
    lines = (line for line in block.splitlines() if _UNFILLED not in line)
    return "\n".join(lines).strip("\n")


def without_empty_sections(card: str) -> str:
    """Return a card without the sections of the hub's template that nobody has filled in, and with a title."""
    if _UNFILLED not in card:
        return card
    with open(ModelCard.default_template_path, encoding="utf-8") as file:
        template = file.read()
    blocks = [block for block in re.sub(r"<!--.*?-->", "", card, flags=re.DOTALL).split("\n\n") if block.strip()]
    kept: list[str] = []
    for block in filter(None, map(_without_unfilled_lines, blocks)):
        if block == _UNTITLED:
            block = _TITLE
        elif not _depth(block) and block.strip() in template:
            continue  # words of the template, which stand in every card
        depth = 2 if block == _VERSIONS else _depth(block)  # PEFT adds it below the last section of all
        while kept and _depth(kept[-1]) and 0 < depth <= _depth(kept[-1]):
            kept.pop()  # a heading without text, followed by another that is no part of it
        kept.append(block)
    while kept and _depth(kept[-1]):
        kept.pop()
    return "\n\n".join(kept)


def _depth(block: str) -> int:
    """Return the depth of a heading that stands alone, 0 for text."""
    match = re.fullmatch(r"(#+) [^\n]*", block.strip())
    return len(match[1]) if match else 0


def facts_of(config: LoraConfig) -> list[tuple[str, str]]:
    """Return rank, settings and base model as rows of a card."""
    targets = config.target_modules
    targets = targets if isinstance(targets, str) else ", ".join(sorted(targets or ()))
    base = config.base_model_name_or_path or "unnamed"
    if config.base_fingerprint:
        base += f" (fingerprint {fingerprint.short(config.base_fingerprint)})"
    columns = accumulator_rank(config.accumulator_rank, config.r)
    settings = f"lora_alpha={config.lora_alpha}, smoothness={config.smoothness!r}, accumulator={config.accumulator!r}"
    return [
        ("base model", base),
        ("rank", f"r={config.r}, and up to {columns} of accumulated change"),
        ("settings", settings + (", use_rslora" if config.use_rslora else "")),
        ("target modules", targets),
    ]


def results_of(folder: str) -> dict[str, float]:
    """Return the latest losses and metrics of the run that wrote the folder, by name; empty if Trainer left none.

    They are read from trainer_state.json in the folder or in its last checkpoint.
    """
    for place in (folder, last_complete_checkpoint(folder)):
        try:
            with open(os.path.join(place or folder, "trainer_state.json"), encoding="utf-8") as file:
                log = json.load(file)["log_history"]
            results = {name: value for entry in log for name, value in entry.items() if name.startswith(_METRICS)}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # a card is not worth failing a save for
        return {n: v for n, v in results.items() if isinstance(v, (int, float)) and not n.endswith(_TIMINGS)}
    return {}


def format_results(results: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in sorted(results.items()))


_EXPORTED = """{metadata}

# LoRA adapter exported from ScaLoRA

A plain LoRA adapter of rank {rank}, exported from a ScaLoRA adapter (arXiv 2510.23818). Relative error of the weight
change against the trained adapter, in the Frobenius norm over all layers: {error:.3g}.

{facts}

```python
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "path/to/this/folder")
```

{serving}
"""
_MERGED = """{metadata}

# Model with a merged ScaLoRA adapter

The base model with a ScaLoRA adapter (arXiv 2510.23818) merged into its weights, in {dtype}. Rounding the sum to that
type changed what was learned by {error:.3g}, relative to its Frobenius norm over all adapted layers.

{facts}

It loads as its base model does, without PEFT: `AutoModel....from_pretrained("path/to/this/folder")`.
"""


def exported_card(config: LoraConfig, rank: int, error: float, obstacles: list[str], results: dict[str, float]) -> str:
    """Return the card of a plain LoRA adapter."""
    serving = f"vLLM serves it with `--enable-lora --max-lora-rank {max_lora_rank(rank)}`."
    if obstacles:
        serving = f"vLLM does not serve it: {'; '.join(obstacles)}."
    facts = _table(("trained as", "ScaLoRA"), *facts_of(config), ("results", format_results(results)))
    metadata = _metadata(config, "peft", ["lora", "scalora"])
    return _EXPORTED.format(metadata=metadata, rank=rank, error=error, facts=facts, serving=serving)


def merged_card(config: LoraConfig, dtype: torch.dtype, error: float) -> str:
    """Return the card of a merged model."""
    name = str(dtype).removeprefix("torch.")
    metadata = _metadata(config, "transformers", ["scalora"])
    return _MERGED.format(metadata=metadata, dtype=name, error=error, facts=_table(*facts_of(config)))


def _metadata(config: LoraConfig, library: str, tags: list[str]) -> str:
    """Return the head of a card, which names the base model where that is one of the hub's."""
    base = config.base_model_name_or_path
    data = ModelCardData(library_name=library, base_model=base if _is_hub_id(base) else None, tags=tags)
    return f"---\n{data.to_yaml()}\n---"


def _is_hub_id(name: str | None) -> bool:
    if not name or os.path.exists(name):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _table(*rows: tuple[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows if value)])


def _read_card(folder: str) -> str:
    path = os.path.join(folder, "README.md")
    if not os.path.exists(path):
        return ""
    with open(path, encoding="utf-8") as file:
        return file.read()
