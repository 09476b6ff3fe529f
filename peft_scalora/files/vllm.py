"""Rules of vLLM 0.33 for the LoRA folders that it serves."""

from __future__ import annotations

from collections.abc import Iterable

from peft import LoraConfig

# Values of --max-lora-rank. An adapter of a lower rank is served under the next one: its file needs no padding.
MAX_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_PARTS = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")
_KEPT_MODULES = ("classifier", "score")


def max_lora_rank(rank: int) -> int | None:
    """Return the lowest --max-lora-rank that serves an adapter of that rank; None if no value is high enough."""
    return next((allowed for allowed in MAX_LORA_RANKS if rank <= allowed), None)


def obstacles(config: LoraConfig, tensors: Iterable[str]) -> list[str]:
    """Return the reasons why vLLM will refuse the adapter, a few words each; empty if it serves the adapter."""
    rank = max([config.r, *config.rank_pattern.values()])
    found = []
    if max_lora_rank(rank) is None:
        found.append(f"rank {rank} is above {MAX_LORA_RANKS[-1]}: export with rank={MAX_LORA_RANKS[-1]} or less")
    if config.bias != "none" or config.lora_bias:
        found.append("it has trained biases")
    if config.layer_replication:
        found.append("it replicates layers")
    if not set(config.modules_to_save or ()) <= set(_KEPT_MODULES):
        found.append(f"modules_to_save={sorted(config.modules_to_save)} holds more than {' or '.join(_KEPT_MODULES)}")
    embeddings = (".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")  # skipped
    kept = tuple(f".{name}.{part}" for name in _KEPT_MODULES for part in ("weight", "bias"))
    other = [key for key in tensors if not key.endswith((*_PARTS, *embeddings, *kept))]
    if other:
        found.append(f"it has tensors beside its factors, such as {other[0]}")
    return found
