"""Rows of the eight commonsense tasks out of random words, and a tiny language model whose tokenizer reads any text."""

import gzip
import json
import random
from functools import cache

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHOICES = {
    "boolq": ["true", "false"],
    "piqa": ["solution1", "solution2"],
    "social_i_qa": ["answer1", "answer2", "answer3"],
    "hellaswag": ["ending1", "ending2", "ending3", "ending4"],
    "winogrande": ["option1", "option2"],
    "ARC-Easy": ["answer1", "answer2", "answer3", "answer4"],
    "ARC-Challenge": ["answer1", "answer2", "answer3", "answer4"],
    "openbookqa": ["answer1", "answer2", "answer3", "answer4"],
}
WORDS = "red blue cat dog sat ran the mat very not naïve 東京 x-ray".split()


def row(choices, answer, words):
    return {
        "instruction": f"Choose: {' '.join(words)}?\n\nAnswer format: {'/'.join(choices)}",
        "input": "",
        "output": f"the correct answer is {answer}",
        "answer": answer,
    }


def task_rows(task, count, seed=0):
    """Rows of many lengths; some ARC rows have three or five choices, as in the data set."""
    generator = random.Random(f"{task} {seed}")
    rows = []
    for number in range(count):
        choices = list(CHOICES[task])
        if task.startswith("ARC"):
            choices = [f"answer{i + 1}" for i in range((4, 3, 5)[number % 3])]
        rows.append(row(choices, generator.choice(choices), generator.choices(WORDS, k=generator.randint(1, 20))))
    return rows


def write_gz(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def write_data(folder, train=12, test=6):
    """`commonsense/TASK/{train,test}.jsonl.gz` of all tasks below `folder`."""
    for task in CHOICES:
        for split, count in (("train", train), ("test", test)):
            write_gz(folder / "commonsense" / task / f"{split}.jsonl.gz", task_rows(task, count, split))
    return folder


@cache
def byte_tokenizer():
    """Byte-level BPE: any text, a choice is several tokens, and the choices' numbers are tokens of their own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["[EOS]"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        [row["instruction"] + row["output"] for task in CHOICES for row in task_rows(task, 20)], trainer
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="[EOS]")


def causal_model(**overrides):
    """A random Llama that reads 512 tokens, with weights so large that choices differ clearly."""
    torch.manual_seed(0)
    settings = dict(
        vocab_size=len(byte_tokenizer()),  # lm-eval cuts the embedding to the tokenizer before it loads an adapter
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=None,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(LlamaConfig(**settings | overrides)).eval()


def save_model(folder):
    causal_model().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)
