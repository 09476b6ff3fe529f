"""Configuration of a ScaLoRA adapter, and what it refuses."""

from __future__ import annotations

import enum
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import RemoteEntryNotFoundError
from peft import LoraConfig

from .accumulator import ACCUMULATORS
from .files import fingerprint
from .files.card import write_note
from .files.checks import WEIGHTS_NAME, accumulator_rank, check_folder
from .maths.scaling import SCALINGS
from .version import install_command


class ScaLoRAPeftType(str, enum.Enum):
    """Type of the method, for places where PEFT expects a `PeftType`.

    PEFT compares and hashes its types as strings, so a member of another enum works wherever one of its own does.
    """

    SCALORA = "SCALORA"


# The capacity of a factored accumulator that was saved as a dense one: all that a layer can need.
UNLIMITED_RANK = 2**31 - 1

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
        scaling: how the columns are scaled, a name in `peft_scalora.maths.scaling.SCALINGS`: "column" (Theorem 5, and
            Theorem 3 where Theorem 5 has no non-negative solution: the paper's rule), "scalar" (Theorem 3), "exact"
            (the non-negative problem that both are special cases of) or "shrink" ("column", but no column grows).
        scaling_interval: optimizer steps from one rescaling to the next, I. 1 is ScaLoRA, more is ScaLoRA-I.
        smoothness: the smoothness constant L of the loss, which with the learning rate η sets the target norm of the
            columns; or "auto": `column_norm2` sets it.
        column_norm2: the squared norm 1 / (L η s²) that orthogonal columns are brought to. None means the mean squared
            column norm of the freshly initialised factor, and 3 times that for "shrink".
        accumulator: where folded change acts in training, a name in `peft_scalora.accumulator.ACCUMULATORS`.
            "factored": beside the base weight, as U V with U (out x R) and V (R x in). "merged": in the base weight
            while its adapter trains, at the price of LoRA of rank r; all else sees the base as it was, and files hold
            U and V. "auto": merged where the weight can hold it (floating point, whole, frozen, of one module), else
            factored.
        accumulator_rank: the rank R of the accumulator. "auto" means 7 r: an exported adapter then has rank 8 r, a rank
            that servers have a tier for if r is one. None means 8 r, the default of version 0.1. Never above
            min(in, out), where it is lossless.
        base_fingerprint: what tells the base model from others; saving records it, loading warns of another base.
        requires: what a reader of adapter_config.json needs to load the adapter; informative.

    Raises:
        ValueError: a field has a value outside its range, or the feature it asks for is not supported.
    """

    # Read from the rules when a command line's options are made of these fields.
    scaling: Literal[tuple(SCALINGS)] = field(  # type: ignore[valid-type]
        default="shrink", metadata={"help": f"How columns are scaled, one of {', '.join(map(repr, SCALINGS))}."}
    )
    scaling_interval: int = field(
        default=10, metadata={"help": "Optimizer steps from one rescaling to the next; 1 rescales every step."}
    )
    smoothness: float | Literal["auto"] = field(
        default="auto", metadata={"help": "Smoothness constant L of the loss, or 'auto'."}
    )
    column_norm2: float | None = field(
        default=None, metadata={"help": "Squared norm that orthogonal columns are brought to; None: the rule's own."}
    )
    accumulator: Literal[tuple(ACCUMULATORS)] = field(  # type: ignore[valid-type]
        default="auto",
        metadata={"help": f"Where folded change acts in training, {', '.join(map(repr, ACCUMULATORS))}."},
    )
    accumulator_rank: int | Literal["auto"] | None = field(
        default="auto", metadata={"help": "Rank R of the accumulator; 'auto' means 7 r, None means 8 r."}
    )
    base_fingerprint: dict | None = field(
        default=None, metadata={"help": "What tells the base model from others; recorded when the adapter is saved."}
    )
    requires: str = field(
        default=f"peft-scalora: {install_command()}, then `import peft_scalora` before loading",
        metadata={"help": "What a reader of adapter_config.json needs to load the adapter; informative."},
    )

    def __post_init__(self):
        if self.peft_version is not None:  # saved, not written by hand
            self._read_dense_as_factored()
        super().__post_init__()
        self.peft_type = ScaLoRAPeftType.SCALORA
        self._check_own_fields()
        self._check_lora_fields()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs
    ) -> ScaLoRAConfig:
        """Load the configuration, and check the weights beside it before anything of its sizes is built.

        Args:
            pretrained_model_name_or_path: a folder or an id on the hub.
            subfolder: where in it the adapter is.
            **kwargs: as for `LoraConfig.from_pretrained`.

        Raises:
            ValueError: the weights are missing on the hub, no safetensors file, or do not fit the configuration.
        """
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        folder = os.path.join(pretrained_model_name_or_path, *filter(None, [subfolder]))
        if not os.path.isdir(folder):
            download = cls._split_kwargs(kwargs)[0]
            try:  # PEFT fetches the same file next, and would fetch a pickle file in its place
                path = hf_hub_download(pretrained_model_name_or_path, WEIGHTS_NAME, subfolder=subfolder, **download)
            except RemoteEntryNotFoundError as error:
                raise ValueError(f"{folder} has no {WEIGHTS_NAME}, the only format ScaLoRA reads.") from error
            folder = os.path.dirname(path)
        check_folder(folder, config)
        return config

    def _check_own_fields(self):
        _check_choice("scaling", self.scaling, SCALINGS)
        if self.accumulator == "dense":
            raise ValueError(
                "accumulator='dense' must be 'factored', which with an accumulator_rank of at least "
                "min(in_features, out_features) of every layer is as exact."
            )
        _check_choice("accumulator", self.accumulator, ACCUMULATORS)
        _check_positive_int("scaling_interval", self.scaling_interval)
        if self.accumulator_rank not in ("auto", None):
            _check_positive_int("accumulator_rank", self.accumulator_rank)
        if self.smoothness != "auto" and not (_is_finite(self.smoothness) and self.smoothness > 0):
            raise ValueError(f"smoothness={self.smoothness!r} must be a positive number or 'auto'.")
        if self.column_norm2 is not None:
            self._check_column_norm2()
        fingerprint.check(self.base_fingerprint)

    def _check_column_norm2(self):
        if not (_is_finite(self.column_norm2) and self.column_norm2 > 0):
            raise ValueError(f"column_norm2={self.column_norm2!r} must be a positive number or None.")
        if self.smoothness != "auto":
            raise ValueError(
                f"smoothness={self.smoothness!r} and column_norm2={self.column_norm2!r} both set the target norm of "
                "the columns: leave one of them out."
            )

    def _check_lora_fields(self):
        # A file of somebody else's may hold any JSON value.
        _check_positive_int("r", self.r)
        _check_finite("lora_alpha", self.lora_alpha)
        _check_finite("lora_dropout", self.lora_dropout)
        for name, check in (("rank_pattern", _check_positive_int), ("alpha_pattern", _check_finite)):
            if not isinstance(getattr(self, name), dict):
                raise ValueError(f"{name}={getattr(self, name)!r} must map module names to numbers.")
            for key, value in getattr(self, name).items():
                check(f"{name}[{key!r}]", value)
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
        """Return R of a layer with adapter rank r and a weight of out_features x in_features."""
        return accumulator_rank(self.accumulator_rank, r, out_features, in_features)

    def accumulator_shapes(self, r: int, out_features: int, in_features: int) -> dict[str, tuple[int, ...]]:
        """Return the names and shapes of the tensors that the accumulator of such a layer is saved as."""
        capacity = self.accumulator_rank_for(r, out_features, in_features)
        return ACCUMULATORS[self.accumulator].shapes((out_features, in_features), capacity)

    def _read_dense_as_factored(self) -> None:
        if self.accumulator == "dense":
            self.accumulator = "factored"
            self.accumulator_rank = UNLIMITED_RANK

    def __setstate__(self, state: dict) -> None:
        """Restore a pickled configuration, also one of an earlier version."""
        self.__dict__.update(state)
        self._read_dense_as_factored()

    def to_dict(self) -> dict:
        """Return the fields, with sets as sorted lists, so that equal adapters are saved as equal bytes."""
        return {name: sorted(v) if isinstance(v, set) else v for name, v in super().to_dict().items()}

    def save_pretrained(self, save_directory: str, **kwargs) -> None:
        """Save the configuration, and say in the model card what the adapter is and what loading it needs."""
        super().save_pretrained(save_directory, **kwargs)
        write_note(save_directory, self)


def _check_choice(name: str, value, choices: Iterable[str]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, choices))}.")


def _check_positive_int(name: str, value) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}={value!r} must be a whole number, 1 or more.")


def _is_finite(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check_finite(name: str, value) -> None:
    if not _is_finite(value):
        raise ValueError(f"{name}={value!r} must be a finite number.")
