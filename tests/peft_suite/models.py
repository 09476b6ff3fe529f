"""Tiny random stand-ins for the hub models that PEFT's tests name, laid out like the hub's local cache.

With HF_HUB_CACHE pointing at that folder, `from_pretrained("<hub id>")` works offline and nothing has to be patched.
None of the tests that concern LoRA needs a tokenizer.
"""

from pathlib import Path

import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5ForConditionalGeneration,
)

REVISION = "0" * 40
# Wide initial weights: with the usual 0.02 so narrow a network outputs next to nothing, and tests that expect an
# adapter to change the output could not see it.
STD = 0.2


def opt():
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=1024, hidden_size=16, word_embed_proj_dim=16, ffn_dim=32, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=128, init_std=STD,
        )
    )  # fmt: skip


def gpt2():
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=1024, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=STD,
            bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip


def gptj():
    return GPTJForCausalLM(
        GPTJConfig(
            vocab_size=1024, n_embd=32, n_layer=2, n_head=4, n_positions=128, rotary_dim=4, initializer_range=STD,
            bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip


def llama_like(config_cls, model_cls):
    return model_cls(
        config_cls(
            vocab_size=1024, hidden_size=16, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=4, head_dim=4, max_position_embeddings=128, initializer_range=STD,
        )
    )  # fmt: skip


def llama():
    return llama_like(LlamaConfig, LlamaForCausalLM)


def qwen2():
    return llama_like(Qwen2Config, Qwen2ForCausalLM)


def gemma3():
    return llama_like(Gemma3TextConfig, Gemma3ForCausalLM)


def t5():
    return T5ForConditionalGeneration(
        T5Config(vocab_size=1024, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0)
    )


def bart():
    return BartForConditionalGeneration(
        BartConfig(
            vocab_size=1024, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=128,
            init_std=STD,
        )
    )  # fmt: skip


def bert_like(config_cls, model_cls):
    return model_cls(
        config_cls(
            vocab_size=1024, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=128, initializer_range=STD,
        )
    )  # fmt: skip


def bert():
    return bert_like(BertConfig, BertForSequenceClassification)


def roberta():
    return bert_like(RobertaConfig, RobertaModel)


HUB_MODELS = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": opt,
    "peft-internal-testing/opt-125m": opt,
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": gpt2,
    "gpt2": gpt2,
    "peft-internal-testing/tiny-random-GPTJForCausalLM": gptj,
    "trl-internal-testing/tiny-random-LlamaForCausalLM": llama,
    "peft-internal-testing/tiny-dummy-qwen2": qwen2,
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": gemma3,
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": t5,
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": bart,
    "bert-base-uncased": bert,
    "peft-internal-testing/tiny-random-RobertaModel": roberta,
}


def build_hub_cache(folder: Path) -> Path:
    """Create the hub cache at `folder` with every model of HUB_MODELS."""
    for hub_id, build in HUB_MODELS.items():
        repository = folder / f"models--{hub_id.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(REVISION)
        torch.manual_seed(0)
        build().save_pretrained(repository / "snapshots" / REVISION)
    return folder
