"""Configuration of a ScaLoRA adapter, and what it refuses."""

from __future__ import annotations

import enum
import os
from dataclasses import dataclass, field
from typing import Literal

from peft import LoraConfig

from .files import replace_file


class ScaLoRAPeftType(str, enum.Enum):
    """PEFT compares and hashes its types as strings, so an own enum member works wherever a `PeftType` does."""

    SCALORA = "SCALORA"


SCALINGS = ("column", "scalar", "exact")
ACCUMULATORS = ("factored", "dense")

# LoraConfig fields whose feature contradicts the method, with the reason shown to the user.
_REFUSED_FIELDS = {
    "use_dora": "DoRA normalises the weight, so a fold would change the model's function",
    "alora_invocation_tokens": "aLoRA applies the adapter to some tokens only, the accumulated change applies to all",
    "use_qalora": "QALoRA pools the inputs of lora_A only",
    "velora_config": "VeLoRA's backward pass gives no exact gradient of lora_A",
    "monteclora_config": "MonteCLoRA samples the factors that a fold has to be exact about",
    "use_bdlora": "block-diagonal factors do not stay block-diagonal under a fold",
    "arrow_config": "Arrow routes between plain LoRA adapters",
    "kasa_config": "KaSA changes the base weights",
    "megatron_config": "Megatron's parallel layers shard lora_A or lora_B",
    "target_parameters": "fused expert parameters have one factor pair for all experts",
    "eva_config": "EVA initialises plain LoRA adapters only",
    "corda_config": "CorDA changes the base weights",
    "lora_ga_config": "LoRA-GA changes the base weights",
}
_SUPPORTED_INITS = (True, False, "gaussian", "orthogonal")


@dataclass
class ScaLoRAConfig(LoraConfig):
    """LoRA whose weight change grows past rank r by rescaling the adapter's columns (ScaLoRA, arXiv 2510.23818).

    Takes every field of `peft.LoraConfig` except those that change the base weights or the meaning of the factors.

    Args:
        scaling: how the columns are scaled: "column" (Theorem 5, and Theorem 3 where Theorem 5 has no non-negative
            solution), "scalar" (Theorem 3) or "exact" (the non-negative problem that both are special cases of).
        scaling_interval: optimizer steps from one rescaling to the next, I. 1 is ScaLoRA, more is ScaLoRA-I.
        smoothness: the smoothness constant L of the loss, or "auto": such that the columns keep the mean squared norm
            of the freshly initialised factor.
        accumulator: where folded change lives: "factored" (U of out x R and V of R x in) or "dense" (out x in, exact,
            for small models).
        accumulator_rank: the rank R of the factored accumulator; None means 8 r. Never above min(in, out).

    Raises:
        ValueError: a field has a value outside its range, or the feature it asks for is not supported.
    """

    scaling: Literal["column", "scalar", "exact"] = field(
        default="column", metadata={"help": "How columns are scaled: 'column', 'scalar' or 'exact'."}
    )
    scaling_interval: int = field(
        default=10, metadata={"help": "Optimizer steps from one rescaling to the next; 1 rescales every step."}
    )
    smoothness: float | Literal["auto"] = field(
        default="auto", metadata={"help": "Smoothness constant L of the loss, or 'auto'."}
    )
    accumulator: Literal["factored", "dense"] = field(
        default="factored", metadata={"help": "Where folded change lives: 'factored' or 'dense'."}
    )
    accumulator_rank: int | None = field(
        default=None, metadata={"help": "Rank R of the factored accumulator; None means 8 r."}
    )
    requires: str = field(
        default="peft-scalora: pip install peft-scalora, then `import peft_scalora` before loading",
        metadata={"help": "What a reader of adapter_config.json needs to load the adapter; informative."},
    )

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = ScaLoRAPeftType.SCALORA
        self._check_own_fields()
        self._check_lora_fields()

    def _check_own_fields(self):
        _check_choice("scaling", self.scaling, SCALINGS)
        _check_choice("accumulator", self.accumulator, ACCUMULATORS)
        _check_positive_int("scaling_interval", self.scaling_interval)
        if self.accumulator_rank is not None:
            _check_positive_int("accumulator_rank", self.accumulator_rank)
        is_number = isinstance(self.smoothness, (int, float)) and not isinstance(self.smoothness, bool)
        if self.smoothness != "auto" and not (is_number and 0 < self.smoothness < float("inf")):
            raise ValueError(f"smoothness={self.smoothness!r} must be a positive number or 'auto'.")

    def _check_lora_fields(self):
        for name, reason in _REFUSED_FIELDS.items():
            value = getattr(self, name)
            if value not in (None, False) and value != []:
                raise ValueError(
                    f"ScaLoRA does not support {name}={value!r}: {reason}. Leave {name} out, or use peft.LoraConfig."
                )
        if not any(self.init_lora_weights is init or self.init_lora_weights == init for init in _SUPPORTED_INITS):
            raise ValueError(
                f"ScaLoRA does not support init_lora_weights={self.init_lora_weights!r}: it changes the base weights "
                f"or freezes a factor. Use one of {', '.join(map(repr, _SUPPORTED_INITS))}."
            )

    def accumulator_rank_for(self, r: int, out_features: int, in_features: int) -> int:
        """R of a layer with adapter rank r and a weight of out_features x in_features."""
        return min(self.accumulator_rank or 8 * r, out_features, in_features)

    def to_dict(self) -> dict:
        """As for LoraConfig, with sets as sorted lists: the same adapter is saved as the same bytes."""
        return {name: sorted(v) if isinstance(v, set) else v for name, v in super().to_dict().items()}

    def save_pretrained(self, save_directory: str, **kwargs) -> None:
        """Save the configuration, and say in the model card what loading the adapter needs."""
        super().save_pretrained(save_directory, **kwargs)
        _add_loading_note(save_directory, self)


def _check_choice(name: str, value, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, choices))}.")


def _check_positive_int(name: str, value) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}={value!r} must be a whole number, 1 or more.")


_NOTE_HEADING = "## Loading this ScaLoRA adapter"
_NOTE_END = "`peft-scalora export path/to/this/folder path/to/plain_lora`."
_NOTE = """{heading}

Trained with ScaLoRA (r={r}, scaling={scaling!r}, rescaled every {interval} steps): the weight change has a rank far
above r. Install the package peft-scalora, then import it before loading:

```python
# pip install peft-scalora
import peft_scalora
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "path/to/this/folder")
```

Without the package PEFT stops with `KeyError: 'SCALORA'`. To serve the adapter without the package, turn it into a
plain LoRA folder once: `peft-scalora export path/to/this/folder path/to/plain_lora`.
"""


def _add_loading_note(folder: str, config: ScaLoRAConfig) -> None:
    path = os.path.join(folder, "README.md")
    card = ""
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            card = file.read()
    note = _NOTE.format(heading=_NOTE_HEADING, r=config.r, scaling=config.scaling, interval=config.scaling_interval)
    # An older note of the same folder goes; what stands around it is the user's and PEFT's.
    before, _, rest = card.partition(_NOTE_HEADING)
    _, _, after = rest.partition(_NOTE_END)
    card = "\n\n".join(part.strip() for part in (before, after) if part.strip())
    replace_file(path, f"{card}\n\n{note}".lstrip())
