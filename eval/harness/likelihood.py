"""Log-probabilities of texts that continue other texts, as lm-evaluation-harness defines them, and what they choose."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .record import is_main_process

Pair = tuple[list[int], list[int]]  # token ids of a context and of its continuation


def encode_pair(tokenizer, context: str, continuation: str) -> Pair:
    """Return the token ids of a context and of what continues it; spaces at the context's end go to the latter.

    The whole is encoded and cut after as many tokens as the context alone has: tokenizers do not encode piece by piece.
    Source: lm-evaluation-harness 0.4.13, `LM._encode_pair`.

    Raises:
        ValueError: one of the two has no token.
    """
    stripped = context.rstrip()
    context_ids = tokenizer.encode(stripped)
    continuation_ids = tokenizer.encode(context + continuation)[len(context_ids) :]
    if not stripped or not continuation_ids:
        raise ValueError(f"context {context!r} and continuation {continuation!r} have to have a token each.")
    return context_ids, continuation_ids


def log_probability(logits_TV: Tensor, tokens_T: Tensor) -> Tensor:
    """Return log P of the tokens, each under its row of logits, summed; in float32 or better."""
    logits_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
    return (logits_TV.gather(1, tokens_T[:, None])[:, 0] - logits_TV.logsumexp(1)).sum()


@torch.no_grad()
def log_likelihoods(
    model: torch.nn.Module, pairs: Sequence[Pair], batch_size: int, description: str = "scoring"
) -> list[float]:
    """Return log P(continuation | context) in nats for every pair, in the order of the pairs.

    Pairs that differ in their last token alone share one forward pass. Batches are padded on the right, where a causal
    model sees nothing of it. The model has to be in evaluation mode.

    Raises:
        ValueError: a pair is longer than the model's context.
    """
    inputs: dict[tuple[int, ...], list[int]] = {}  # what the model reads, and the pairs that are read off it
    for index, (context, continuation) in enumerate(pairs):
        inputs.setdefault(tuple(context + continuation)[:-1], []).append(index)
    longest_first = sorted(inputs, key=len, reverse=True)
    check_length(model, len(longest_first[0]) if longest_first else 0)
    results = [0.0] * len(pairs)
    starts = range(0, len(longest_first), batch_size)
    for start in tqdm(starts, desc=description, unit="batch", leave=False, disable=not is_main_process()):
        batch = longest_first[start : start + batch_size]
        members = [[(index, *pairs[index]) for index in inputs[ids]] for ids in batch]
        first = min(len(context) for row in members for _, context, _ in row) - 1  # the first token that is predicted
        logits_BTV = _logits(model, batch, first)
        found = [
            (index, log_probability(logits_TV[len(context) - 1 - first :][: len(continuation)], ids))
            for logits_TV, row in zip(logits_BTV, members, strict=True)
            for index, context, continuation in row
            for ids in [torch.tensor(continuation, device=logits_TV.device)]
        ]
        for (index, _), value in zip(found, torch.stack([v for _, v in found]).tolist(), strict=True):
            results[index] = value
    return results


def _logits(model: torch.nn.Module, batch: list[tuple[int, ...]], first: int) -> Tensor:
    """Return logits (B x T x V) of the positions from `first` on; those of the padding mean nothing."""
    device = next(model.parameters()).device
    ids_BT = torch.zeros(len(batch), len(batch[0]), dtype=torch.long)
    mask_BT = torch.zeros_like(ids_BT)
    for row, ids in enumerate(batch):
        ids_BT[row, : len(ids)] = torch.tensor(ids)
        mask_BT[row, : len(ids)] = 1
    kept = ids_BT.shape[1] - first
    # The head is as large as the body in a small model: it is applied where it is needed only.
    output = model(input_ids=ids_BT.to(device), attention_mask=mask_BT.to(device), use_cache=False, logits_to_keep=kept)
    return output.logits[:, -kept:]


def check_length(model: torch.nn.Module, longest: int) -> None:
    """Refuse a context with its continuation, less the last token, of more tokens than the model reads.

    Raises:
        ValueError: names both numbers.
    """
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and longest > limit:
        raise ValueError(
            f"a context with its continuation has {longest + 1} tokens, and the model reads {limit}: "
            "shorten it, nothing is cut off here."
        )


def chosen(log_likelihoods: Sequence[float]) -> int:
    """Return the most probable choice, the first of equals (lm-eval's acc)."""
    return max(range(len(log_likelihoods)), key=log_likelihoods.__getitem__)


def chosen_by_length(log_likelihoods: Sequence[float], choices: Sequence[str]) -> int:
    """Return the choice that is most probable a character (lm-eval's acc_norm)."""
    return chosen([value / len(choice) for value, choice in zip(log_likelihoods, choices, strict=True)])
