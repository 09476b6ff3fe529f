"""The two suites of the frontier study, and the base model that both adapt.

`text`: continued pretraining of a byte-level language model on another kind of text than it knows.
`recall`: the same model learns generated pairs of a name and a number by heart.

Suffixes: N rows, T bytes of a row.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from peft_scalora.files.atomic import new_folder
from peft_scalora.finetuning.corpus import generate

from .frontier_scores import IGNORED

BYTES = 256
BASE_LENGTH = 64
LENGTH = 32
HELD_OUT_ROWS = 512
BATCH = 8


@dataclass(frozen=True)
class BaseModel:
    """Sizes of the base model, and how it is pretrained."""

    width: int = 64
    layers: int = 2
    steps: int = 3000
    batch: int = 16
    learning_rate: float = 3e-3


@dataclass(frozen=True)
class Texts:
    """Streams of bytes: what the base model is pretrained on, and what it is adapted to."""

    base: Tensor
    base_held_out: Tensor
    new: Tensor
    new_held_out: Tensor

    def digest(self) -> str:
        """Return what tells these texts from others."""
        return hashlib.sha256(self.base.numpy().tobytes() + self.new.numpy().tobytes()).hexdigest()[:16]


def _stream(texts: list[str]) -> Tensor:
    return torch.frombuffer(bytearray("\n\n".join(texts).encode()), dtype=torch.uint8)


def _file_stream(data_dir: str, path: str, fields: tuple[str, str]) -> Tensor:
    with gzip.open(os.path.join(data_dir, path), "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return _stream([f"{row[fields[0]]}\n{row[fields[1]]}" for row in rows])


def _generated_stream(lexicon: str, size: int, seed: int) -> Tensor:
    return _stream([row["sentence"] for row in generate(lexicon, size, seed) if row["label"]])


def load_texts(data_dir: str | None) -> Texts:
    """Return GSM8K (base) and MATH (new) of a data folder, or generated sentences of two vocabularies."""
    if data_dir is None:
        return Texts(
            base=_generated_stream("train", 60_000, 0),
            base_held_out=_generated_stream("train", 4_000, 1),
            new=_generated_stream("held_out", 40_000, 0),
            new_held_out=_generated_stream("held_out", 4_000, 1),
        )
    problems = {"gsm8k": ("question", "answer"), "math": ("problem", "solution")}
    return Texts(
        base=_file_stream(data_dir, "gsm8k/train.jsonl.gz", problems["gsm8k"]),
        base_held_out=_file_stream(data_dir, "gsm8k/test.jsonl.gz", problems["gsm8k"]),
        new=_file_stream(data_dir, "math/train.jsonl.gz", problems["math"]),
        new_held_out=_file_stream(data_dir, "math/test.jsonl.gz", problems["math"]),
    )


def held_out_rows(stream: Tensor) -> Tensor:
    """Return HELD_OUT_ROWS rows of LENGTH bytes that are spread evenly over the stream. Shape (N, T)."""
    starts = torch.linspace(0, len(stream) - LENGTH, HELD_OUT_ROWS).long()
    return torch.stack([stream[start : start + LENGTH] for start in starts]).long()


def random_rows(stream: Tensor, count: int, length: int, generator: torch.Generator) -> Tensor:
    """Return rows of `length` bytes that start anywhere. Shape (N, T)."""
    starts = torch.randint(0, len(stream) - length, (count,), generator=generator)
    return torch.stack([stream[start : start + length] for start in starts]).long()


class TextTask:
    """Predict the next byte of the new text."""

    def __init__(self, texts: Texts):
        self.stream = texts.new
        self.rows_NT = held_out_rows(texts.new_held_out)

    def batch(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return the ids and labels of one step."""
        ids_NT = random_rows(self.stream, BATCH, LENGTH, generator)
        return ids_NT, ids_NT

    def score(self, population) -> list[dict[str, float]]:
        """Return the held-out loss of every run."""
        return [{"loss": loss} for loss in population.held_out_losses(self.rows_NT, self.rows_NT)]

    def counted(self) -> dict[str, float]:
        """Return the losses of counts of bytes, and of pairs of bytes, in the whole training text."""
        pairs = torch.bincount(self.stream[:-1].long() * BYTES + self.stream[1:].long(), minlength=BYTES**2)
        pairs = pairs.view(BYTES, BYTES).double() + 1 / BYTES
        first, second = self.rows_NT[:, :-1], self.rows_NT[:, 1:]
        single = pairs.sum(0)
        return {
            "unigram counts": -(single / single.sum())[second].log().mean().item(),
            "bigram counts": -(pairs / pairs.sum(1, keepdim=True))[first, second].log().mean().item(),
        }


class RecallTask:
    """Learn by heart which number belongs to which name."""

    def __init__(self, pairs: int = 500, name_length: int = 6, digits: int = 4):
        generator = torch.Generator().manual_seed(0)
        names = ord("a") + torch.randint(0, 26, (pairs, name_length), generator=generator)
        numbers = ord("0") + torch.randint(0, 10, (pairs, digits), generator=generator)
        colon, end = torch.full((pairs, 1), ord(":")), torch.full((pairs, 1), ord("\n"))
        self.ids_NT = torch.cat([end, names, colon, numbers], dim=1)
        self.labels_NT = torch.cat([torch.full((pairs, name_length + 2), IGNORED), numbers], dim=1)

    def batch(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return the ids and labels of one step."""
        chosen = torch.randint(0, len(self.ids_NT), (32,), generator=generator)
        return self.ids_NT[chosen], self.labels_NT[chosen]

    @torch.no_grad()
    def score(self, population) -> list[dict[str, float]]:
        """Return the loss on the numbers, and the share of them that greedy decoding gets right to the last digit."""
        parts = [population.logits(ids_NT[None])[:, :, :-1].argmax(-1) for ids_NT in self.ids_NT.split(100)]
        predicted_SNT = torch.cat(parts, dim=1)
        labels_NT = self.labels_NT[:, 1:]
        right_SN = ((predicted_SNT == labels_NT) | (labels_NT == IGNORED)).all(-1)
        losses = population.held_out_losses(self.ids_NT, self.labels_NT)
        return [{"loss": loss, "recall": recall} for loss, recall in zip(losses, right_SN.double().mean(1).tolist())]

    def counted(self) -> dict[str, float]:
        """Return the loss of a guess: every digit is as likely as any other."""
        return {"guessing": torch.tensor(10.0).log().item()}


def _new_model(settings: BaseModel) -> GPTNeoXForCausalLM:
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=BYTES,
        hidden_size=settings.width,
        intermediate_size=4 * settings.width,
        num_hidden_layers=settings.layers,
        num_attention_heads=4,
        max_position_embeddings=BASE_LENGTH,
    )
    return GPTNeoXForCausalLM(config)


def base_model(settings: BaseModel, texts: Texts, cache: str) -> GPTNeoXForCausalLM:
    """Return the pretrained base model: the cached one, or one that is pretrained now and cached."""
    key = json.dumps(asdict(settings), sort_keys=True) + texts.digest()
    folder = os.path.join(cache, f"base-{hashlib.sha256(key.encode()).hexdigest()[:12]}")
    if not os.path.isdir(folder):
        model = _pretrained(settings, texts.base)
        os.makedirs(cache, exist_ok=True)
        with new_folder(folder) as staged:
            model.save_pretrained(staged)
    return GPTNeoXForCausalLM.from_pretrained(folder, use_cache=False)


def _pretrained(settings: BaseModel, stream: Tensor) -> GPTNeoXForCausalLM:
    model = _new_model(settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    generator = torch.Generator().manual_seed(0)
    for _ in tqdm(range(settings.steps), desc="pretraining", mininterval=10):
        ids_NT = random_rows(stream, settings.batch, BASE_LENGTH, generator)
        model(input_ids=ids_NT, labels=ids_NT).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model
