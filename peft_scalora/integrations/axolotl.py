"""A plugin for axolotl: `plugins: [peft_scalora.integrations.axolotl.ScaLoRAPlugin]` and `adapter: scalora`."""

from __future__ import annotations

from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from axolotl.loaders.adapter import load_lora
from axolotl.utils.dict import DictDefault
from peft import PeftModel, get_peft_model
from pydantic import BaseModel, ConfigDict, Field
from transformers import PreTrainedModel

from ..config import ScaLoRAConfig
from .conversion import to_scalora

ADAPTER = "scalora"


class ScaLoRASettings(BaseModel):
    """The block `scalora:`. What it lacks keeps the default of ScaLoRAConfig."""

    model_config = ConfigDict(extra="forbid")

    scaling: str | None = Field(None, description="How columns are scaled.")
    scaling_interval: int | None = Field(None, description="Optimizer steps from one rescaling to the next.")
    smoothness: float | str | None = Field(None, description="Smoothness constant L of the loss, or auto.")
    column_norm2: float | None = Field(None, description="Squared norm that orthogonal columns are brought to.")
    accumulator: str | None = Field(None, description="Where folded change acts in training.")
    accumulator_rank: int | None = Field(None, description="Rank R of the accumulator.")


class ScaLoRAArgs(BaseModel):
    """Fields that the plugin adds to axolotl's configuration."""

    scalora: ScaLoRASettings = Field(default_factory=ScaLoRASettings, description="Settings of `adapter: scalora`.")


class ScaLoRAPlugin(BasePlugin):
    """Plugin that adapts what axolotl's options of LoRA name, with ScaLoRA."""

    def get_input_args(self) -> str:
        """Return where axolotl finds the settings of the plugin."""
        return f"{__name__}.ScaLoRAArgs"

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        """Return the name under which the adapter is asked for."""
        return [AdapterCapabilities(name=ADAPTER)]

    def load_adapter(
        self, model: PreTrainedModel, cfg: DictDefault, inference: bool = False, config_only: bool = False
    ) -> tuple[PeftModel | None, ScaLoRAConfig] | None:
        """Return the model with a new adapter, or with that of `lora_model_dir`, and its configuration."""
        if cfg.adapter != ADAPTER:
            return None
        _, lora_config = load_lora(model, cfg, config_only=True)
        config = to_scalora(lora_config, **(cfg.scalora or {}))
        if config_only:
            return None, config
        if cfg.lora_model_dir:
            model = PeftModel.from_pretrained(model, cfg.lora_model_dir, is_trainable=not inference)
        else:
            model = get_peft_model(model, config)
        model.print_trainable_parameters()
        return model, config
