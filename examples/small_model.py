"""A language model of characters that is pretrained in half a minute, and generated text for it and its adapters.

The model learns sentences of one vocabulary. The text to adapt to has the same grammar and other nouns and verbs.
"""

from __future__ import annotations

import json
import os
import string
from random import Random

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from peft_scalora.files.atomic import new_folder, replace_file
from peft_scalora.finetuning.corpus import generate

CHARACTERS = string.ascii_letters + " .,?'"
PRETRAINING_STEPS = 1500
BATCH = 32
LEARNING_RATE = 3e-3


def sentences(split: str, count: int, seed: int) -> list[str]:
    """Return generated sentences, all of them grammatical, in the vocabulary of "train" or of "held_out"."""
    return [row["sentence"] for row in generate(split, 2 * count, seed) if row["label"]][:count]


def write_texts(folder: str, rows: int) -> dict[str, str]:
    """Write rows to adapt to, to choose a learning rate on and to report on; return their paths."""
    os.makedirs(folder, exist_ok=True)
    paths = {}
    for part, count, seed in (("train", rows, 0), ("eval", 300, 1), ("test", 1000, 2)):
        paths[part] = os.path.join(folder, f"{part}.jsonl")
        texts = sentences("held_out", count, seed)
        replace_file(paths[part], "".join(json.dumps({"text": text}) + "\n" for text in texts))
    return paths


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of single characters."""
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<unk>", "<end>", *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<end>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def pretrained(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return a model of two layers of width 64 that knows the sentences of the first vocabulary."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, PRETRAINING_STEPS)
    texts = sentences("train", 20_000, 0)
    random = Random(0)
    for _ in tqdm(range(PRETRAINING_STEPS), desc="pretraining", mininterval=5):
        rows = [text + tokenizer.eos_token for text in random.sample(texts, BATCH)]
        batch = tokenizer(rows, return_tensors="pt", padding=True, truncation=True, max_length=128)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model


def small_model(cache: str) -> str:
    """Return the folder of the pretrained model; it is made at the first call."""
    folder = os.path.join(cache, "small-llama")
    if not os.path.isdir(folder):
        tokenizer = make_tokenizer()
        model = pretrained(tokenizer)
        os.makedirs(cache, exist_ok=True)
        with new_folder(folder) as staged:
            model.save_pretrained(staged)
            tokenizer.save_pretrained(staged)
    return folder
