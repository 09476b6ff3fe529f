"""Methods that train all weights: full fine-tuning, and GaLore."""

from __future__ import annotations

import torch

from .shared import Prepared, refuse_quantized, target_layers

# α and T: the authors' GLUE example has α = 4 and T = 500. In a short run that would be one projection for all of it:
# here it is renewed at every tenth of the run, but not more often than every 50 steps or less than every 200.
SCALE, SHORTEST_GAP, LONGEST_GAP = 4, 50, 200


def full(model, settings, batches) -> Prepared:
    """Train all weights in float32: usual steps would be rounded away in bfloat16, which autocast computes in."""
    refuse_quantized(model, settings, "all of its weights are trained")
    return Prepared(model.float(), arguments={"bf16": settings.dtype == "bfloat16"})


def galore(model, settings, batches) -> Prepared:
    """Train all weights by GaLore (arXiv 2403.03507): the gradients of the target layers are projected to rank r.

    Raises:
        ImportError: galore-torch is missing; names the extra.
    """
    try:
        from galore_torch.galore_projector import GaLoreProjector
    except ImportError as error:
        raise ImportError("method='galore' needs galore-torch and bitsandbytes: pip install '.[benchmark]'.") from error
    torch.serialization.add_safe_globals([GaLoreProjector])  # its optimizer keeps one per weight in its state
    gap = min(LONGEST_GAP, max(SHORTEST_GAP, settings.steps // 10))
    prepared = full(model, settings, batches)
    prepared.arguments |= {
        "optim": "galore_adamw",
        "optim_target_modules": list(target_layers(model, settings)),
        "optim_args": f"rank={settings.r}, update_proj_gap={gap}, scale={SCALE}",
    }
    return prepared
