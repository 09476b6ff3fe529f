"""One run of the Gauss-Newton study: the model, its data, and a step of every method at one large batch."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from eval.harness.corpus import byte_stream, held_out_loss, in_rows, windows
from peft_scalora import GaussNewton, GaussNewtonConfig
from peft_scalora.gauss_newton import matrix_names

GAUSS_NEWTON = {
    "gn": {"variant": "gn"},
    "gn-prox-linear": {"variant": "prox_linear"},
    "gn-layerwise": {"variant": "gn", "layerwise": True},
}
BASELINES = ("muon", "soap", "adamw")
METHODS = ("gn", "gn-prox-linear", *BASELINES, "gn-layerwise")
LINE_SEARCH = 4  # micro-batches that choose the step size, at once


@dataclass(frozen=True)
class Setting:
    """One run of the study."""

    method: str
    learning_rate: float
    seed: int = 0
    inner_steps: int = 128  # N; a large batch is N micro-batches
    micro_batch: int = 8  # sequences
    length: int = 64  # bytes a sequence
    hidden: int = 64
    layers: int = 2
    target: float = 0.9  # held-out nats a byte
    max_steps: int = 60

    def name(self) -> str:
        return f"{self.method}-n{self.inner_steps}-{self.learning_rate:g}-seed{self.seed}"


class Corpus:
    """Random windows to train on and fixed ones that are held out."""

    def __init__(self, path: str | None, setting: Setting):
        if path:
            stream = _bytes_of(path)
            cut = len(stream) * 9 // 10
            self.train = stream[:cut]
            held_out = stream[cut:]
        else:
            self.train = byte_stream(60000, 0)
            held_out = byte_stream(2000, 7)
        self.held_out = in_rows(held_out, setting.length, 256)
        self.length = setting.length
        self.vocabulary = 256 if path else 128
        self.generator = torch.Generator().manual_seed(setting.seed + 1)

    def batch(self, rows: int) -> torch.Tensor:
        return windows(self.train, self.length, rows, self.generator)


def _bytes_of(path: str) -> torch.Tensor:
    with open(path, "rb") as file:
        return torch.frombuffer(bytearray(file.read()), dtype=torch.uint8).long()


def next_byte_loss(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def make_model(setting: Setting, vocabulary: int) -> LlamaForCausalLM:
    torch.manual_seed(setting.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=setting.hidden,
            intermediate_size=setting.hidden * 8 // 3 // 8 * 8,
            num_hidden_layers=setting.layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            vocab_size=vocabulary,
            max_position_embeddings=setting.length,
            initializer_range=setting.hidden**-0.5,  # transformers' 0.02 is for widths in the thousands
            attn_implementation="eager",
        )
    )


def baseline_optimizers(model: nn.Module, method: str, lr: float) -> list[torch.optim.Optimizer]:
    """Return optimizers without weight decay, all of the same betas; Muon is for matrices, AdamW for the rest."""
    betas = (0.9, 0.95)
    if method == "soap":
        try:
            from pytorch_optimizer import SOAP
        except ImportError as error:
            raise ImportError("SOAP needs pytorch-optimizer: pip install '.[benchmark]'.") from error
        return [SOAP(model.parameters(), lr=lr, betas=(0.95, 0.95), weight_decay=0.0, precondition_frequency=1)]
    names = matrix_names(model) if method == "muon" else set()
    matrices = [p for n, p in model.named_parameters() if n in names]
    others = [p for n, p in model.named_parameters() if n not in names]
    adamw = torch.optim.AdamW(others, lr=lr, betas=betas, weight_decay=0.0)
    return [adamw, torch.optim.Muon(matrices, lr=lr, weight_decay=0.0)] if matrices else [adamw]


def baseline_step(model: nn.Module, setting: Setting) -> Callable[[Corpus], None]:
    optimizers = baseline_optimizers(model, setting.method, setting.learning_rate)
    rows = setting.inner_steps * setting.micro_batch
    part = min(rows, 64)  # sequences in memory at a time

    def step(corpus: Corpus) -> None:
        for _ in range(rows // part):
            ids = corpus.batch(part)
            (next_byte_loss(model(input_ids=ids).logits, ids) * part / rows).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    return step


def gauss_newton_step(model: nn.Module, setting: Setting) -> Callable[[Corpus], None]:
    """Return a function that makes one outer step: the inner loop and the line search."""
    config = GaussNewtonConfig(inner_steps=setting.inner_steps, line_search_points=10, **GAUSS_NEWTON[setting.method])
    optimizer = GaussNewton(model.named_parameters(), config, lr=setting.learning_rate, muon=matrix_names(model))

    def step(corpus: Corpus) -> None:
        done = optimizer.progress["outer_steps"]
        while optimizer.progress["outer_steps"] == done:
            ids = corpus.batch(setting.micro_batch * (LINE_SEARCH if optimizer.in_line_search else 1))

            def forward(params, ids=ids):
                return functional_call(model, params, kwargs={"input_ids": ids}).logits

            optimizer.loss(forward, lambda logits, ids=ids: next_byte_loss(logits, ids)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    step.optimizer = optimizer
    return step


def run(setting: Setting, data: str | None) -> dict:
    """Train until the target or `max_steps`: held-out loss, tokens and CPU seconds (without evaluation) by step."""
    corpus = Corpus(data, setting)
    model = make_model(setting, corpus.vocabulary)
    step = (gauss_newton_step if setting.method in GAUSS_NEWTON else baseline_step)(model, setting)
    micro_batches = setting.inner_steps + (LINE_SEARCH if setting.method in GAUSS_NEWTON else 0)
    tokens = micro_batches * setting.micro_batch * setting.length
    points = []
    seconds = 0.0
    bar = tqdm(range(1, setting.max_steps + 1), desc=setting.name())
    for number in bar:
        started = time.process_time()  # other processes' share of the machine does not count
        step(corpus)
        seconds += time.process_time() - started
        loss = held_out_loss(model, corpus.held_out)
        points.append({"step": number, "loss": loss, "tokens": number * tokens, "seconds": seconds})
        if hasattr(step, "optimizer"):
            points[-1]["step_size"] = step.optimizer.progress["step_size"]
        bar.set_postfix(loss=f"{loss:.3f}")
        if not loss < 50 or loss <= setting.target:
            break
    bar.close()
    return {"points": points, "torch": torch.__version__}
