"""Tiny models of many architectures, each trained with an adapter, and read again by a process of its own.

Run as a script with a folder, it loads every adapter below that folder, native and exported, and writes its outputs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers as t
from diffusers import UNet2DConditionModel
from helpers_models import floats, scalora_config, tiny_gpt2, tokens
from helpers_transformers import ATTENTION, SPEECH, TEXT, ids, images, logits, pairs, sounds, t5, vit, whisper
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peft_scalora import export_lora

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
GROUPED = {"num_key_value_heads": 1, "head_dim": 8}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


class UNet(nn.Module):
    """A diffusers UNet that is called by keyword and returns a dict, as transformers' models do."""

    def __init__(self):
        super().__init__()
        self.unet = UNet2DConditionModel(
            sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8,),
            down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",), norm_num_groups=2,
            cross_attention_dim=8, attention_head_dim=2,
        )  # fmt: skip

    def forward(self, sample: Tensor, text: Tensor) -> dict[str, Tensor]:
        return {"logits": self.unet(sample, torch.tensor([3, 5]), text).sample}

    def gradient_checkpointing_enable(self) -> None:
        self.unet.enable_gradient_checkpointing()


@dataclass(frozen=True)
class Case:
    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Tensor]]
    targets: list[str] | str
    options: tuple = ()

    def base(self, dtype: torch.dtype) -> nn.Module:
        """Return the base model, the same one at every call."""
        torch.manual_seed(0)
        return self.build().to(dtype).eval()

    def cast_inputs(self, dtype: torch.dtype) -> dict[str, Tensor]:
        return {name: x.to(dtype) if x.is_floating_point() else x for name, x in self.inputs().items()}


def longformer():
    settings = TEXT | NO_DROPOUT | {"max_position_embeddings": 32, "pad_token_id": 0}
    config = t.LongformerConfig(**settings, attention_window=4)
    return t.LongformerForTokenClassification(config)


def falcon():
    settings = {name: value for name, value in TEXT.items() if name != "intermediate_size"}
    return t.FalconForCausalLM(t.FalconConfig(**settings, multi_query=True))


def mixtral():
    settings = TEXT | {"num_key_value_heads": 1, "num_local_experts": 2, "num_experts_per_tok": 2}
    return t.MixtralForCausalLM(t.MixtralConfig(**settings))


def qwen3_moe():
    settings = TEXT | GROUPED | {"num_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    return t.Qwen3MoeForCausalLM(t.Qwen3MoeConfig(**settings))


def wav2vec2():
    return t.Wav2Vec2ForCTC(t.Wav2Vec2Config(**SPEECH, apply_spec_augment=False, layerdrop=0.0, **SPEECH_DROPOUT))


SPEECH_DROPOUT = dict.fromkeys(("hidden_dropout", "attention_dropout", "feat_proj_dropout", "final_dropout"), 0.0)


def deberta():
    config = t.DebertaV2Config(
        **TEXT, **NO_DROPOUT, relative_attention=True, position_buckets=4, pos_att_type=["p2c", "c2p"],
        share_att_key=True, norm_rel_ebd="layer_norm", position_biased_input=False, max_position_embeddings=32,
    )  # fmt: skip
    return t.DebertaV2ForSequenceClassification(config)


def gemma3():
    return t.Gemma3ForCausalLM(t.Gemma3TextConfig(**TEXT | GROUPED, sliding_window=4, max_position_embeddings=32))


QKVO = ["q_proj", "k_proj", "v_proj", "o_proj"]
CASES = {
    "Longformer": Case(longformer, ids, ["query", "value"]),
    "Falcon": Case(falcon, ids, "all-linear"),
    "Mixtral": Case(mixtral, ids, QKVO),
    "Qwen3-MoE": Case(qwen3_moe, ids, QKVO),
    "T5": Case(t5, pairs, ["q", "v", "wi", "wo"]),
    "Whisper": Case(
        whisper, lambda: {"input_features": floats(4, 4, 16), "decoder_input_ids": tokens()}, [*ATTENTION, "fc1"]
    ),
    "ViT": Case(vit, images, ["q_proj", "v_proj", "query", "value"]),
    "Wav2Vec2": Case(wav2vec2, sounds, [*ATTENTION, "intermediate_dense"]),
    "UNet": Case(
        UNet, lambda: {"sample": floats(2, 4, 8, 8), "text": floats(2, 3, 8)}, ["to_q", "to_k", "to_v", "to_out.0"]
    ),
    "GPT-2": Case(tiny_gpt2, ids, ["c_attn", "c_proj"], (("fan_in_fan_out", True),)),
    "DeBERTa-v3": Case(deberta, ids, ["query_proj", "value_proj", "dense"]),
    "Gemma-3": Case(gemma3, ids, "all-linear"),
}


def outputs(model: nn.Module, case: Case, dtype: torch.dtype) -> Tensor:
    with torch.no_grad():
        return logits(model.eval(), case.cast_inputs(dtype)).float().contiguous()


def train(case: Case, dtype: torch.dtype, checkpointing: bool) -> PeftModel:
    """Train six steps, each of which rescales."""
    base = case.base(dtype)
    if checkpointing:
        base.gradient_checkpointing_enable()
        if hasattr(base, "enable_input_require_grads"):
            base.enable_input_require_grads()
    model = get_peft_model(base, scalora_config(target_modules=case.targets, **dict(case.options))).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-2)
    generator = torch.Generator().manual_seed(3)
    for _ in range(6):
        optimizer.zero_grad()
        result = logits(model, case.cast_inputs(dtype)).float()
        (result - torch.randn(result.shape, generator=generator)).square().mean().backward()
        optimizer.step()
    return model.eval()


def write(folder: Path, model: PeftModel) -> None:
    model.save_pretrained(folder / "adapter")
    export_lora(model, folder / "plain")


def read(root: Path) -> None:
    """Write what every adapter below `root` computes in this process."""
    for folder in sorted(path.parent for path in root.glob("*/adapter")):
        name, dtype, _ = folder.name.split()
        case, dtype = CASES[name], DTYPES[dtype]
        found = {
            part: outputs(PeftModel.from_pretrained(case.base(dtype), folder / part), case, dtype)
            for part in ("adapter", "plain")
        }
        save_file(found, folder / "outputs.safetensors")


def read_outputs(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "outputs.safetensors")


if __name__ == "__main__":
    read(Path(sys.argv[1]))
