"""Figures of a saved adapter: size, and rank, norm and discarded norm of each layer."""

from __future__ import annotations

import os

from ..files.checks import PROGRESS_KEY
from ..maths.accumulator import effective_rank, singular_values
from .saved import read_adapter, saved_layers


def adapter_info(folder: str, tol: float = 0.01) -> dict:
    """Return the settings and size of a saved adapter, with figures for each layer.

    Args:
        folder: of a saved ScaLoRA adapter.
        tol: fraction of a layer's largest singular value above which the others count towards its rank.

    Returns:
        A dict with the base model, the scaling and its interval, bytes, mean effective rank, and `layers`: by module
        name r, optimizer steps and rescalings so far (0 for a layer trained as plain LoRA), accumulated columns,
        effective rank, Frobenius norm of the change, and norm discarded so far.
    """
    config, state = read_adapter(folder)
    layers = {}
    for name, layer in saved_layers(state, config).items():
        sigma = singular_values(*layer.change_factors())
        progress = state.get(f"{name}.{PROGRESS_KEY}")
        steps, rescalings = (0, 0) if progress is None else progress[:2].tolist()
        layers[name.removeprefix("base_model.model.")] = {
            "r": layer.lora_A.shape[0],
            "steps": steps,
            "rescalings": rescalings,
            "accumulated_columns": 0 if layer.U is None else layer.U.shape[1],
            "effective_rank": int(effective_rank(sigma, tol)),
            "norm": float(sigma.square().sum().sqrt()),
            "discarded": layer.discarded,
        }
    return {
        "base_model": config.base_model_name_or_path,
        "scaling": config.scaling,
        "scaling_interval": config.scaling_interval,
        "bytes": os.path.getsize(os.path.join(folder, "adapter_model.safetensors")),
        "mean_effective_rank": sum(layer["effective_rank"] for layer in layers.values()) / max(1, len(layers)),
        "layers": layers,
    }


def format_info(info: dict) -> str:
    """Return what `adapter_info` returned as a table for a terminal."""
    width = max((len(name) for name in info["layers"]), default=5)
    lines = [
        f"base model {info['base_model']}, scaling {info['scaling']} every {info['scaling_interval']} steps, "
        f"{info['bytes']:,} bytes",
        f"{'layer':<{width}}  {'r':>4}  {'steps':>6}  {'rescaled':>8}  {'columns':>7}  {'rank':>5}  {'norm':>9}  "
        f"{'discarded':>9}",
    ]
    for name, layer in info["layers"].items():
        lines.append(
            f"{name:<{width}}  {layer['r']:>4}  {layer['steps']:>6}  {layer['rescalings']:>8}  "
            f"{layer['accumulated_columns']:>7}  {layer['effective_rank']:>5}  {layer['norm']:>9.3g}  "
            f"{layer['discarded']:>9.2g}"
        )
    lines.append(f"mean effective rank {info['mean_effective_rank']:.1f}")
    return "\n".join(lines)
