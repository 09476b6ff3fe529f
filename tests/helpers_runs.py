"""A tiny classifier, a tiny language model and data files for runs of Trainer and of the command."""

import json

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModel,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    set_seed,
)

WORDS = ["red", "blue", "cat", "dog", "sat", "ran", "the", "a", "on", "mat", "very", "not"]
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[EOS]"]


def save_tokenizer(folder):
    vocabulary = {word: index for index, word in enumerate(SPECIAL + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]"
    ).save_pretrained(folder)


def save_classifier(folder, **overrides) -> str:
    set_seed(0)
    config = BertConfig(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        num_labels=2,
        **overrides,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    save_tokenizer(folder)
    return str(folder)


def save_encoder(folder, config=None) -> str:
    """A model without a classification head; that of `save_classifier` unless another configuration is given."""
    set_seed(0)
    bert = BertConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    AutoModel.from_config(config or bert).save_pretrained(folder)
    save_tokenizer(folder)
    return str(folder)


def language_model(**overrides) -> LlamaForCausalLM:
    set_seed(0)
    settings = dict(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=0,
        eos_token_id=4,
        bos_token_id=None,
    )
    return LlamaForCausalLM(LlamaConfig(**settings | overrides))


def save_language_model(folder, **overrides) -> str:
    language_model(**overrides).save_pretrained(folder)
    save_tokenizer(folder)
    return str(folder)


def sentences(count: int) -> list[str]:
    """Word sequences whose first word decides the label in `classification_rows`."""
    return [" ".join(WORDS[(i * 7 + j * (i % 5 + 1)) % len(WORDS)] for j in range(3 + i % 4)) for i in range(count)]


def classification_rows(count: int) -> list[dict]:
    return [{"sentence": text, "label": WORDS.index(text.split()[0]) % 2} for text in sentences(count)]


def write_rows(path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
