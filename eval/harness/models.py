"""How the base of a method is loaded."""

from __future__ import annotations

from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from peft_scalora.finetuning.prompts import load_tokenizer

from .training import DTYPES, Training

IN_4_BIT = ("qlora", "qscalora")
NOT_QUANTIZED = ["lm_head", "classifier", "score"]  # heads, of which a classifier's is trained


def quantization_config(method: str, dtype: str) -> BitsAndBytesConfig | None:
    """Return NF4 with double quantization (arXiv 2305.14314) for the methods on a 4-bit base, else None.

    `dtype` is the name of the type that the weights are computed in.
    """
    if method not in IN_4_BIT:
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=DTYPES[dtype],
        llm_int8_skip_modules=NOT_QUANTIZED,
    )


def load_causal_lm(settings: Training):
    """Return tokenizer and causal language model, in 4 bit for the methods that want it."""
    model = AutoModelForCausalLM.from_pretrained(
        settings.model,
        dtype=DTYPES[settings.dtype],
        quantization_config=quantization_config(settings.method, settings.dtype),
    )
    return load_tokenizer(settings.model), model
