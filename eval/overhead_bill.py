"""What training an adapter holds, sends and leaves: bytes on device and host, and the rank it is served at."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from peft import get_peft_model_state_dict

import peft_scalora
from eval.harness.memory import peak_bytes
from eval.overhead_runs import Run
from peft_scalora import ScaLoRAConfig
from peft_scalora.files.vllm import max_lora_rank
from peft_scalora.layer import ScaLoRALayer


@dataclass(frozen=True)
class Bill:
    """Bytes, and a rank.

    Attributes:
        weights: the base model's, on the device.
        factors: what is trained; as many bytes of gradients are reduced over ranks in each step.
        accumulators: U, V and counters, on the device.
        optimizer: its state.
        step: the most that a step adds: activations, gradients, the optimizer's temporaries.
        rescaling: the most that a rescaling adds beside the gradients; 0 for methods without one.
        host: copies of base weights on the host.
        file: the tensors of a saved adapter.
        served_rank: vLLM's --max-lora-rank for it; None where vLLM cannot serve the method.
    """

    weights: int
    factors: int
    accumulators: int
    optimizer: int
    step: int
    rescaling: int
    host: int
    file: int
    served_rank: int | None

    @property
    def outside_of_rescalings(self) -> int:
        """Bytes on the device in a step that does not rescale."""
        return self.weights + self.factors + self.accumulators + self.optimizer + self.step

    @property
    def peak(self) -> int:
        """Bytes on the device at the most."""
        return self.outside_of_rescalings - self.step + max(self.step, self.rescaling)

    def as_dict(self) -> dict:
        """Return all figures by name."""
        return asdict(self) | {"outside_of_rescalings": self.outside_of_rescalings, "peak": self.peak}


def bill_of(run: Run, ids: torch.Tensor) -> Bill:
    """Measure what a run holds, with steps and rescalings of its own."""
    params = [p for p in run.model.parameters() if p.requires_grad]
    layers = [module for module in run.model.modules() if isinstance(module, ScaLoRALayer)]
    merged = [layer.merged_base for layer in layers if layer.merged_base is not None]
    host = sum(each.pristine.nbytes for each in merged)
    step = peak_bytes(lambda: run.step(ids))
    rescaling = rescaling_peak(run, ids) if layers else 0
    state = [v for each in run.optimizer.state.values() for v in each.values() if isinstance(v, torch.Tensor)]
    factors = sum(p.nbytes for p in params)
    saved = sum(t.nbytes for t in get_peft_model_state_dict(run.model).values())
    return Bill(
        weights=sum(p.nbytes for p in run.model.parameters()) - factors,
        factors=factors,
        accumulators=saved - factors,
        optimizer=sum(v.nbytes for v in state),
        step=step,
        rescaling=rescaling,
        host=host,
        file=saved,
        served_rank=served_rank(run),
    )


def rescaling_peak(run: Run, ids: torch.Tensor) -> int:
    """Return the most bytes that a rescaling adds, of a plain fold and of one that recompresses or merges."""
    run.model(input_ids=ids, labels=ids).loss.backward()
    peak = max(peak_bytes(lambda: peft_scalora.rescale(run.model, run.optimizer)) for _ in range(2))
    run.optimizer.zero_grad()
    return peak


def served_rank(run: Run) -> int | None:
    """Return vLLM's tier for the adapter, exported if it is ScaLoRA's; None for methods that are no LoRA."""
    config = run.model.peft_config["default"]
    if isinstance(config, ScaLoRAConfig):
        return max_lora_rank(config.r + config.accumulator_rank)
    is_lora = config.peft_type == "LORA" and not config.use_dora
    return max_lora_rank(config.r) if is_lora else None
