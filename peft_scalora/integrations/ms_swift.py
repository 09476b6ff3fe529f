"""A tuner for ms-swift: a file with `import peft_scalora.integrations.ms_swift` is all that --external_plugins needs.

ms-swift has no options for settings of a plugin. Its --model_kwargs, which it puts into the environment, holds them:
--model_kwargs '{"scalora_scaling_interval": 5}'.
"""

from __future__ import annotations

import os

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from swift.arguments import SftArguments
from swift.pipelines.train.tuner import get_modules_to_save, get_target_modules
from swift.tuner_plugin import PeftTuner, tuners_map

from .conversion import SETTINGS, to_scalora

# ms-swift's name of a task: PEFT's, where it has another.
_TASKS = {"EMBEDDING": None, "RERANKER": "SEQ_CLS", "GENERATIVE_RERANKER": "CAUSAL_LM", "DECISION": "CAUSAL_LM"}


class ScaLoRATuner(PeftTuner):
    """Tuner that reads ms-swift's options of LoRA, and saves the accumulated change with the factors.

    The state dict of trainable parameters that ms-swift hands over under DeepSpeed is completed when it is saved.
    """

    @staticmethod
    def prepare_model(args: SftArguments, model: torch.nn.Module) -> PeftModel:
        """Return the model with a new adapter, of the targets and the rank that ms-swift's options name."""
        task = args.task_type.upper()
        config = LoraConfig(
            task_type=_TASKS.get(task, task),
            r=args.lora_rank,
            lora_alpha=args.lora_alpha,
            lora_dropout=args.lora_dropout,
            target_modules=get_target_modules(args, model),
            modules_to_save=get_modules_to_save(args, model, task),
            bias=args.lora_bias,
            use_rslora=args.use_rslora,
            use_dora=args.use_dora,
            init_lora_weights=args.init_weights,
        )
        model.requires_grad_(False)
        return get_peft_model(model, to_scalora(config, **_own_settings()))

    @staticmethod
    def save_pretrained(
        model: PeftModel, save_directory: str, state_dict: dict | None = None, safe_serialization: bool = True, **kwargs
    ) -> None:
        """Save the adapter with its accumulated change."""
        kwargs.setdefault("selected_adapters", ["default"])
        model.save_pretrained(save_directory, state_dict=state_dict, safe_serialization=safe_serialization, **kwargs)


def _own_settings() -> dict[str, str | None]:
    return {name: os.environ.get(f"SCALORA_{name.upper()}") for name in SETTINGS}


tuners_map["scalora"] = ScaLoRATuner
