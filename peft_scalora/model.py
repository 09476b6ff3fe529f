"""ScaLoRAModel: LoRA's model with ScaLoRA layers on every backend that PEFT builds LoRA layers for."""

from __future__ import annotations

import math
import re
import warnings
from itertools import chain

import torch
from peft import PeftModel
from peft.tuners.lora import LoraModel
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .config import UNLIMITED_RANK, ScaLoRAConfig
from .files.checks import check_values
from .files.fingerprint import difference, fingerprint, short
from .files.upgrade import upgraded
from .layer import ScaLoRALayer, make_scalora
from .lora_only import as_lora, refuse_fused_experts, warn_in_diffusers, warn_of_partial_factors
from .maths.accumulator import truncate
from .merged_base import find_owned_weights
from .rescaling.history import check_history
from .rescaling.hooks import install_deepspeed_hook
from .state import completed, layers_with, warn_if_never_rescaled, whole_layers

# Combination types whose result PEFT defines on the whole weight change, and on the factors' entries.
_ON_CHANGE = ("svd", "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd")
_ON_ENTRIES = ("ties", "dare_linear", "dare_ties", "magnitude_prune")


def _is_rescalable(base: nn.Module, config: ScaLoRAConfig) -> bool:
    """Tell whether PEFT adapts the layer by one product lora_B @ lora_A of its own making."""
    custom = tuple(config._custom_modules or ())
    return getattr(base, "groups", 1) == 1 and not isinstance(base, custom)


def _make_all_scalora(module: LoraLayer, adapter: str, config: ScaLoRAConfig) -> None:
    """Turn the layer and the LoRA layers in it into ScaLoRA layers: nn.MultiheadAttention has one in its projection."""
    for layer in [layer for layer in module.modules() if isinstance(layer, LoraLayer)]:
        make_scalora(layer, adapter, config)


class ScaLoRAModel(LoraModel):
    """Base model with ScaLoRA adapters; built by `peft.get_peft_model(model, ScaLoRAConfig(...))`."""

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """Names of the accumulated state, which all ranks compute alike: DDP need not broadcast it before a forward."""
        return [f"base_model.{name}" for name, _ in self.named_buffers() if "scalora_" in name]

    def _pre_injection_hook(self, model: nn.Module, config: ScaLoRAConfig, adapter_name: str) -> None:
        """Take the fingerprint while the base model is whole: it may be sharded by the time it is saved."""
        super()._pre_injection_hook(model, config, adapter_name)
        self.base_fingerprint = _fingerprint(model, config)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args, **kwargs) -> None:
        """Add an adapter; one that is added with the very configuration of a rescaled one becomes a copy of it.

        TRL makes its reference adapters so, and then copies the parameters itself, but not the accumulated change.
        """
        install_deepspeed_hook()
        warn_in_diffusers()
        refuse_fused_experts(self.peft_config[adapter_name], model)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        find_owned_weights(model)
        config = self.peft_config[adapter_name]
        if config.accumulator_rank == UNLIMITED_RANK:
            shapes = [layer.accumulator(adapter_name).shape for layer in self._layers_with(adapter_name)]
            config.accumulator_rank = max(map(min, shapes), default=None)
        for name in (name for name, other in self.peft_config.items() if other is config and name != adapter_name):
            if any(layer.accumulator(name).columns for layer in self._layers_with(name)):
                warnings.warn(
                    f"Adapter {adapter_name!r} is added with the configuration object of {name!r} and becomes a copy "
                    "of it, as TRL's reference adapters have to. For a fresh adapter pass a copy of the configuration."
                )
                for layer in self._layers_with(name):
                    layer.copy_adapter(name, adapter_name)

    def _check_target_module_compatiblity(self, peft_config, model, target_name):
        super()._check_target_module_compatiblity(as_lora(peft_config), model, target_name)

    def _layers_with(self, adapter: str) -> list[ScaLoRALayer]:
        return [layer for layer in self._scalora_layers().values() if layer.has_accumulator(adapter)]

    def _create_and_replace(self, lora_config, adapter_name, target, target_name, parent, current_key, **kwargs):
        base = target.get_base_layer() if isinstance(target, LoraLayer) else target
        if tp_plan := _tensor_parallel_plan(self.model, base, current_key):
            raise ValueError(
                f"ScaLoRA does not support tensor parallelism: {current_key} has _hf_tp_plan={tp_plan!r}. "
                "Load the model without tp_plan, or use peft.LoraConfig."
            )
        if getattr(lora_config, "target_modules_to_tie", None):
            raise ValueError(
                f"ScaLoRA does not support ensure_weight_tying=True for target_modules={target_name!r}: tied layers "
                "would share one pair of factors. Set ensure_weight_tying=False, or target only one of the tied layers."
            )
        if not _is_rescalable(base, lora_config):
            warnings.warn(
                f"{current_key}: rescaling is not defined for {type(base).__name__} with groups > 1 or a custom LoRA "
                "layer; this layer is trained as plain LoRA."
            )
        super()._create_and_replace(lora_config, adapter_name, target, target_name, parent, current_key, **kwargs)
        # A layer that transformers has already given a plain LoRA adapter.
        if isinstance(target, LoraLayer) and not isinstance(target, ScaLoRALayer) and _is_rescalable(base, lora_config):
            _make_all_scalora(target, adapter_name, lora_config)

    @staticmethod
    def _create_new_module(lora_config: ScaLoRAConfig, adapter_name: str, target: nn.Module, **kwargs) -> nn.Module:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        new_module = LoraModel._create_new_module(lora_config, adapter_name, target, **kwargs)
        if _is_rescalable(base, lora_config):
            _make_all_scalora(new_module, adapter_name, lora_config)
        return new_module

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        warn_if_never_rescaled(model, adapter_name, config)
        config.base_fingerprint = _base_fingerprint(model, config)
        for layer in layers_with(model, adapter_name).values():
            check_history(layer, adapter_name)
        state_dict = completed(model, adapter_name, state_dict)
        state = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        warn_of_partial_factors(state, adapter_name)
        return state

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        state_dict = upgraded(state_dict)
        check_values(state_dict, f"the adapter loaded as {adapter_name!r}")
        _warn_of_another_base(model, config)
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        _refuse_base_weights(model, remapped)
        return whole_layers(model, adapter_name, remapped)

    @classmethod
    def _convert_state_dict_for_initial_model(cls, *args, **kwargs):
        raise ValueError(
            "ScaLoRA does not support path_initial_model_for_weight_conversion: it converts adapters that changed the "
            "base weights. Use peft_scalora.export_lora for a plain LoRA adapter."
        )

    def merge_adapter(self, *args, **kwargs) -> None:
        super().merge_adapter(*args, **kwargs)
        _warn_of_requantization(self._scalora_layers())

    def _unload_and_optionally_merge(self, *args, **kwargs) -> nn.Module:
        layers = self._scalora_layers()  # which are gone afterwards
        for adapter in {name for layer in layers.values() for name in layer.scalora_config}:
            warn_if_never_rescaled(self.model, adapter, self.peft_config[adapter])
        unloaded = super()._unload_and_optionally_merge(*args, **kwargs)
        _warn_of_requantization(layers)
        return unloaded

    def _scalora_layers(self) -> dict[str, ScaLoRALayer]:
        return {name: module for name, module in self.model.named_modules() if isinstance(module, ScaLoRALayer)}

    def add_weighted_adapter(self, adapters, weights, adapter_name, combination_type="svd", *args, **kwargs) -> None:
        """Combine adapters as PEFT does, with their accumulated change.

        "svd" and the "*_svd" types act on the whole change. "linear" and "cat" combine the factors as for LoRA and add
        the accumulated changes with the same weights, exactly (the new accumulator has the sum of their ranks).
        "ties", "dare_linear", "dare_ties" and "magnitude_prune" compare entries of the factors, which have no
        counterpart in accumulated change: refused as soon as there is some, use their "*_svd" types.
        """
        if adapter_name in self.peft_config:
            return
        layers = [layer for layer in self.modules() if isinstance(layer, ScaLoRALayer)]
        known = [name for name in adapters if name in self.peft_config]
        accumulators = [layer.accumulator(name) for layer in layers for name in known if layer.has_accumulator(name)]
        has_change = any(accumulator.columns for accumulator in accumulators)
        if combination_type in _ON_ENTRIES and has_change and len(adapters) > 1:
            raise ValueError(
                f"ScaLoRA does not support combination_type={combination_type!r} for adapters that have been rescaled: "
                f"use {combination_type + '_svd'!r}, which acts on the whole weight change."
            )
        super().add_weighted_adapter(adapters, weights, adapter_name, combination_type, *args, **kwargs)
        layers = [layer for layer in layers if layer.has_accumulator(adapter_name)]
        for layer in layers:
            _combine_progress(layer, [name for name in adapters if layer.has_accumulator(name)], adapter_name)
        if combination_type not in _ON_CHANGE or len(adapters) == 1:
            rank = 0
            for name in known:
                capacities = [layer.accumulator(name).capacity for layer in layers if layer.has_accumulator(name)]
                rank += max(capacities, default=0)
            self.peft_config[adapter_name].accumulator_rank = rank or None
            for layer in layers:
                parts = [(name, weight) for name, weight in zip(adapters, weights) if layer.has_accumulator(name)]
                _combine_accumulated(layer, parts, adapter_name, rank)


def _tensor_parallel_plan(model: nn.Module, layer: nn.Module, name: str) -> str | None:
    """Return how transformers has split a layer over processes, such as "colwise"; None for a whole one."""
    config = getattr(getattr(model, "config", None), "distributed_config", None)
    is_parallel = getattr(model, "_device_mesh", None) is not None and getattr(config, "tp_size", 1) > 1
    plans = getattr(model, "tp_plan", None) if is_parallel else None
    # Plans name layers of all blocks at once: "layers.*.q_proj".
    return getattr(layer, "_hf_tp_plan", None) or (plans or {}).get(re.sub(r"\.\d+(?=\.|$)", ".*", name))


def _base_fingerprint(model: nn.Module, config: ScaLoRAConfig) -> dict:
    """Return that of a PeftModel, or of a transformers model that carries the adapter itself."""
    tuner = getattr(model, "base_model", None)
    return tuner.base_fingerprint if isinstance(tuner, ScaLoRAModel) else _fingerprint(model, config)


def _fingerprint(model: nn.Module, config: ScaLoRAConfig) -> dict:
    """Return the fingerprint of the base weights without change that an adapter in training keeps in them."""
    for layer in model.modules():
        if isinstance(layer, ScaLoRALayer):
            layer.restore_base()
    return fingerprint(model, config.modules_to_save)


def _warn_of_another_base(model: nn.Module, config: ScaLoRAConfig) -> None:
    """Warn if the adapter was trained on another base model.

    It is no error: a base with another adapter merged into it, or with a larger vocabulary, may be meant.
    """
    recorded = config.base_fingerprint
    if recorded is None:
        return
    current = _base_fingerprint(model, config)
    if reason := difference(recorded, current):
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        there = config.base_model_name_or_path
        here = getattr(base, "name_or_path", None) or type(base).__name__
        warnings.warn(
            f"The adapter was trained on base model {there!r} (fingerprint {short(recorded)}) and is loaded onto "
            f"another one, {here!r} (fingerprint {short(current)}): {reason}. Unless you mean it, load it onto the "
            "model it was trained on."
        )


def embeddings_of(base: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
    """Return the input and output embeddings of a transformers model; None for each that a model does not have."""
    found = []
    for name in ("get_input_embeddings", "get_output_embeddings"):
        get = getattr(base, name, None)
        try:
            found.append(None if get is None else get())
        except NotImplementedError:  # so transformers says that there are none
            found.append(None)
    return tuple(found)


def _refuse_base_weights(model: nn.Module, state_dict: dict[str, torch.Tensor]) -> None:
    """Refuse a file that would replace weights of the base model unseen; raises ValueError.

    PEFT saves embeddings (of a vocabulary that has grown) and biases with an adapter, nothing else.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    embeddings = {id(p) for module in embeddings_of(base) if module is not None for p in module.parameters()}
    own = ("lora_", "modules_to_save.", "token_adapter.", "original_module.")
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        kept = id(tensor) in embeddings or name.endswith("bias") or any(part in name for part in own)
        if name in state_dict and not kept:
            raise ValueError(
                f"The adapter's file has {name}, a weight of the base model, which loading would replace. Remove it "
                "from the file if you trust the rest."
            )


def _warn_of_requantization(layers: dict[str, ScaLoRALayer]) -> None:
    """Say, once for all layers just merged into a quantized weight, what quantizing the sum again cost."""
    measured = [layer.__dict__.pop("requantization", None) for layer in layers.values()]
    measured = [norms for norms in measured if norms is not None]
    if not measured:
        return
    error, change = (math.hypot(*norms) for norms in zip(*measured))
    size = error / change if change else float("inf")
    warnings.warn(
        f"Merging quantized {len(measured)} weights again, which moved them by {size:.2g} times the norm of the change "
        "that was merged (at 1, nothing of it need be left). Left unmerged, the adapter is exact; "
        "peft_scalora.export_merged writes the sum unquantized."
    )


def _combine_progress(layer: ScaLoRALayer, names: list[str], new_name: str) -> None:
    new = layer.progress(new_name)
    old = [layer.progress(name) for name in names]
    new.steps = max((progress.steps for progress in old), default=0)
    new.rescalings = max((progress.rescalings for progress in old), default=0)


def _combine_accumulated(layer: ScaLoRALayer, parts: list[tuple[str, float]], new_name: str, rank: int) -> None:
    """Give the new adapter Σ weight · U V of the parts, in an accumulator of that rank."""
    if not parts:
        return
    products = [(layer.accumulator(name).factors(), weight) for name, weight in parts]
    U = torch.cat([weight * U for (U, _), weight in products], 1)
    V = torch.cat([V for (_, V), _ in products], 0)
    accumulator = layer.accumulator(new_name)
    room = min(rank, *accumulator.shape)
    if U.shape[1] > room:
        (U,), (V,), _ = truncate(U[None], V[None], room)
    accumulator.allocate(accumulator.shape, room, U.device)
    accumulator.replace([accumulator], U[None], V[None])
