"""A LoRA configuration of another tool, turned into one of ScaLoRA."""

from dataclasses import fields

import pytest
from peft import LoraConfig

from peft_scalora import ScaLoRAConfig
from peft_scalora.integrations.conversion import SETTINGS, to_scalora


def test_what_lora_adapts_is_adapted():
    lora = LoraConfig(
        r=3, lora_alpha=7, target_modules=["q_proj"], rank_pattern={"q_proj": 2}, use_rslora=True, bias="none",
        modules_to_save=["head"], task_type="CAUSAL_LM", lora_dropout=0.1, layers_to_transform=[1],
    )  # fmt: skip
    config = to_scalora(lora)
    assert type(config) is ScaLoRAConfig and config.peft_type == "SCALORA"
    for field in fields(LoraConfig):
        if field.name != "peft_type":
            assert getattr(config, field.name) == getattr(lora, field.name), field.name
    default = ScaLoRAConfig()
    assert all(getattr(config, name) == getattr(default, name) for name in SETTINGS)


def test_settings_may_be_numbers_strings_or_missing():
    config = to_scalora(LoraConfig(), scaling_interval="3", smoothness="2.5", accumulator_rank=None, scaling="column")
    assert (config.scaling_interval, config.smoothness, config.scaling) == (3, 2.5, "column")
    assert config.accumulator_rank == ScaLoRAConfig().accumulator_rank
    assert to_scalora(LoraConfig(), smoothness="auto").smoothness == "auto"


@pytest.mark.parametrize(
    ("lora", "settings", "said"),
    [
        ({}, {"scaling_intervall": 2}, "scaling_intervall is no setting of ScaLoRA: there are scaling, "),
        ({}, {"scaling_interval": "often"}, "scaling_interval='often' must be a whole number"),
        ({"use_dora": True}, {}, "ScaLoRA does not support use_dora=True"),
    ],
)
def test_what_scalora_lacks_is_refused(lora, settings, said):
    with pytest.raises(ValueError, match=said):
        to_scalora(LoraConfig(**lora), **settings)
