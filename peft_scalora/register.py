"""Making PEFT know the method. PEFT has no entry point for methods of other packages, so its mappings are extended."""

from __future__ import annotations

import peft.mapping
import peft.utils.hotswap

from ._seams import check_loaded
from .config import ScaLoRAConfig, ScaLoRAPeftType
from .lora_only import install_exact_conversion
from .model import ScaLoRAModel
from .rescaling.hooks import install_hook

SCALORA = ScaLoRAPeftType.SCALORA
# A hotswapped adapter brings tensors, not its configuration: these have to agree.
_HOTSWAP_FIELDS = [
    "r",
    "use_rslora",
    "lora_dropout",
    "alpha_pattern",
    "rank_pattern",
    "accumulator_rank",
]


def register() -> None:
    """Register ScaLoRA with PEFT and hook torch's optimizers; a second call does nothing.

    Raises:
        RuntimeError: PEFT has a method of that name already.
        SeamError: PEFT or torch lacks something that the package relies on; names it and the remedy.
    """
    known = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING.get(SCALORA)
    if known is ScaLoRAConfig:
        return
    if known is not None and known.__module__ != ScaLoRAConfig.__module__:  # equal after a reload
        raise RuntimeError(
            f"PEFT already has a method {SCALORA.value!r} ({known.__module__}.{known.__name__}). Uninstall "
            "peft-scalora to use that one, or install a PEFT release without it."
        )
    check_loaded()
    peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[SCALORA] = ScaLoRAConfig
    peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[SCALORA] = ScaLoRAModel
    peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING[SCALORA] = ScaLoRAModel.prefix
    peft.utils.hotswap.CONFIG_KEYS_TO_CHECK[SCALORA] = _HOTSWAP_FIELDS
    install_exact_conversion()
    install_hook()
