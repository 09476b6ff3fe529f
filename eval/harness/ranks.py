"""The processes of a distributed run, and evaluation spread over them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain

import torch
import torch.distributed as dist
from accelerate import PartialState


def this_process() -> PartialState:
    """Return this process among those of `accelerate launch`, in contact with them, its own device chosen.

    To be called before a model is loaded: weights in 4 bit go to the present device, which is the first GPU otherwise.
    """
    return PartialState(cpu=not torch.cuda.is_available())


def over_ranks(function: Callable[[Sequence], list], items: Sequence) -> list:
    """Return `function(items)`, one result an item, where every process computes its share; all get all.

    Results are in the order of the items. Every process has to call it, with the same items.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return function(items)
    size, rank = dist.get_world_size(), dist.get_rank()
    per_rank = -(-len(items) // size)
    shares = [None] * size
    dist.all_gather_object(shares, function(items[rank * per_rank : (rank + 1) * per_rank]))
    return list(chain.from_iterable(shares))
