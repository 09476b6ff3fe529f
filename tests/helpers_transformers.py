"""Tiny transformers models of many architectures, with an adapter trained on each as a user would."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
import transformers as t
from helpers_models import floats, scalora_config, tokens
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

TEXT = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "initializer_range": 0.2,
}
SEQ2SEQ = {
    "vocab_size": 40, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "init_std": 0.2, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2,
}  # fmt: skip
SPEECH = {
    "vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24,
    "conv_dim": (8, 8), "conv_stride": (5, 4), "conv_kernel": (10, 4), "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}  # fmt: skip


def ids() -> dict[str, Tensor]:
    return {"input_ids": tokens()}


def pairs() -> dict[str, Tensor]:
    return {"input_ids": tokens(), "decoder_input_ids": tokens().flip(0)}


def images(size: int = 16) -> dict[str, Tensor]:
    return {"pixel_values": floats(4, 3, size, size)}


def sounds() -> dict[str, Tensor]:
    return {"input_values": floats(4, 400)}


def whisper() -> PreTrainedModel:
    settings = SEQ2SEQ | {"num_mel_bins": 4, "max_source_positions": 8, "max_target_positions": 16}
    return t.WhisperForConditionalGeneration(t.WhisperConfig(**settings))


def seq2seq(model: type[PreTrainedModel], **settings) -> PreTrainedModel:
    return model(model.config_class(**SEQ2SEQ | {"max_position_embeddings": 16} | settings))


def t5() -> PreTrainedModel:
    settings = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    return t.T5ForConditionalGeneration(t.T5Config(**settings, decoder_start_token_id=0))


def llava() -> PreTrainedModel:
    vision = TEXT | {"vocab_size": 1, "image_size": 16, "patch_size": 8, "projection_dim": 16}
    config = t.LlavaConfig(
        text_config=t.LlamaConfig(**TEXT), vision_config=t.CLIPVisionConfig(**vision), image_token_index=39
    )
    return t.LlavaForConditionalGeneration(config)


def distilbert() -> PreTrainedModel:
    settings = {"vocab_size": 40, "dim": 16, "hidden_dim": 24, "n_layers": 1, "n_heads": 2, "num_labels": 3}
    return t.DistilBertForSequenceClassification(t.DistilBertConfig(**settings))


def vit(labels: int = 3) -> PreTrainedModel:
    settings = {name: value for name, value in TEXT.items() if name != "vocab_size"}
    return t.ViTForImageClassification(t.ViTConfig(**settings, image_size=16, patch_size=8, num_labels=labels))


def resnet() -> PreTrainedModel:
    settings = {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1], "num_labels": 3, "layer_type": "basic"}
    return t.ResNetForImageClassification(t.ResNetConfig(**settings))


def convnext() -> PreTrainedModel:
    config = t.ConvNextConfig(hidden_sizes=[4, 4, 4, 4], depths=[1, 1, 1, 1], num_labels=3)
    return t.ConvNextForImageClassification(config)


def segformer() -> PreTrainedModel:
    settings = {"hidden_sizes": [8] * 4, "num_attention_heads": [1] * 4, "depths": [1] * 4, "decoder_hidden_size": 8}
    settings["initializer_range"] = 0.5
    return t.SegformerForSemanticSegmentation(t.SegformerConfig(**settings))


@dataclass(frozen=True)
class Architecture:
    """A model, its inputs, and how it is adapted."""

    build: Callable[[], PreTrainedModel]
    inputs: Callable[[], dict[str, Tensor]]
    options: dict = field(default_factory=dict)

    def adapted(self, folder, seed: int = 0) -> PeftModel:
        """Trained on the base model that it saves in `folder`; in evaluation mode all along: its outputs are fixed."""
        torch.manual_seed(seed)
        self.build().save_pretrained(folder)
        return adapted(type(self.build()).from_pretrained(folder), self.inputs(), **self.options)


def adapted(base: PreTrainedModel, inputs: dict[str, Tensor], **options) -> PeftModel:
    model = get_peft_model(base, scalora_config(**options)).eval()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    generator = torch.Generator().manual_seed(3)
    for _ in range(6):
        optimizer.zero_grad()
        result = logits(model, inputs)
        (result - torch.randn(result.shape, generator=generator)).square().mean().backward()
        optimizer.step()
    return model


def logits(model: torch.nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    result = model(**inputs)
    return result["logits"] if "logits" in result else result[0]


ATTENTION = ["q_proj", "v_proj"]
# Models whose class the task type does not give, or whose head other names end with.
UNUSUAL_CLASSES = {
    "BERT for answers": Architecture(
        lambda: t.BertForQuestionAnswering(t.BertConfig(**TEXT)),
        ids,
        {"target_modules": ["query", "value"], "task_type": "QUESTION_ANS"},
    ),
    "DistilBERT": Architecture(
        distilbert,
        ids,
        {
            "target_modules": ["q_lin", "v_lin"],
            "task_type": "SEQ_CLS",
            "modules_to_save": ["pre_classifier", "classifier"],
        },
    ),
    "ViT": Architecture(
        vit, images, {"target_modules": ["q_proj", "v_proj", "query", "value"], "modules_to_save": ["classifier"]}
    ),
    "Whisper": Architecture(
        whisper,
        lambda: {"input_features": floats(4, 4, 16), "decoder_input_ids": tokens()},
        {"target_modules": [*ATTENTION, "proj_out"]},
    ),
    "LLaVA": Architecture(llava, ids, {"target_modules": ATTENTION, "task_type": "CAUSAL_LM"}),  # which it is not for
    "Qwen3": Architecture(
        lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**TEXT, num_key_value_heads=1, head_dim=8, tie_word_embeddings=False)),
        ids,
        {"target_modules": "all-linear"},
    ),
}
# Models that transformers finds no input embeddings in.
WITHOUT_EMBEDDINGS = {
    "ResNet": Architecture(
        resnet, partial(images, 32), {"target_modules": ["convolution"], "modules_to_save": ["classifier"]}
    ),
    "ConvNext": Architecture(
        convnext, partial(images, 32), {"target_modules": ["pwconv1"], "modules_to_save": ["classifier"]}
    ),
    "Segformer": Architecture(segformer, partial(images, 32), {"target_modules": ["v_proj", "fc1"]}),
    # With a parametrized convolution.
    "Wav2Vec2": Architecture(
        lambda: t.Wav2Vec2ForCTC(t.Wav2Vec2Config(**SPEECH)), sounds, {"target_modules": ATTENTION}
    ),
    "HuBERT": Architecture(lambda: t.HubertForCTC(t.HubertConfig(**SPEECH)), sounds, {"target_modules": ATTENTION}),
}
# Models whose encoder, decoder and head share one weight.
TIED = {
    f"{name}, {target}": Architecture(
        build, pairs, {"target_modules": ["q_proj", "q", target], "task_type": "SEQ_2_SEQ_LM"}
    )
    for name, build in {
        "BART": partial(seq2seq, t.BartForConditionalGeneration),
        "mBART": partial(seq2seq, t.MBartForConditionalGeneration),
        "Marian": partial(seq2seq, t.MarianMTModel),
        "Pegasus": partial(seq2seq, t.PegasusForConditionalGeneration),
        "T5": t5,
    }.items()
    for target in ("lm_head", "shared", "embed_tokens")
}
