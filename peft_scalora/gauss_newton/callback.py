"""Gauss-Newton training under an unmodified Trainer."""

from __future__ import annotations

import logging

from torch import nn
from transformers import TrainerCallback

from .config import GaussNewtonConfig
from .forward import LinearizedForward, LogitsLoss, base_model, task_loss
from .grouping import layers_of, matrix_names
from .optimizer import GaussNewton

logger = logging.getLogger(__name__)
_LEFT_BEHIND = "_gauss_newton_put_back"  # attribute of a model while it is changed: undoes that


class GaussNewtonCallback(TrainerCallback):
    """Callback that trains with Gauss-Newton: `Trainer(..., callbacks=[GaussNewtonCallback(config)])`, or SFTTrainer.

    One step of Trainer is one step of `GaussNewton`. The first `inner_steps` steps move δ, each on a batch of its own.
    The next `line_search_steps` choose the step size on theirs, and the last of them commits. Learning rate, its
    schedule, weight decay, AdamW's betas, clipping, accumulation and logging stay Trainer's. The model always holds the
    committed weights, so these are evaluated and saved. The last outer step is cut short where `max_steps` ends.

    When training begins, an optimizer on the same parameters replaces the one that Trainer made. When training ends, or
    fails within a forward pass, Trainer's is put back. From the beginning of each step until all its gradients are
    there, `model.forward` is one whose loss is linearized. Attention without forward-mode rules (SDPA, flash) is
    switched to "eager" meanwhile, with a warning. If a training is interrupted elsewhere, the next GaussNewtonCallback
    puts back what it left behind.

    Logs have gauss_newton/outer_step, gauss_newton/step_size (0: rejected) and gauss_newton/loss: that of the committed
    weights on the batches of the line search.

    Args:
        config: settings of the method.
        loss: (logits, labels, **kwargs) -> scalar, for models whose loss is not one of transformers' own. A model of
            another library has to return a dict with its logits, with and without labels.

    Raises:
        ValueError: when training begins, if a setting of Trainer or the model rules it out; names the remedy.
    """

    def __init__(self, config: GaussNewtonConfig | None = None, loss: LogitsLoss | None = None):
        self.config = config or GaussNewtonConfig()
        self.loss = loss
        self.optimizer: GaussNewton | None = None
        self._forward: LinearizedForward | None = None
        self._undo: list = []

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        base = base_model(model)
        self._put_back()
        getattr(base, _LEFT_BEHIND, lambda: None)()
        check_arguments(args, self.config)
        check_model(model)
        loss = self.loss or task_loss(model)
        replaced = optimizer.optimizer
        self.optimizer = take_over(replaced, model, self.config)
        self._forward = LinearizedForward(model, self.optimizer, loss, on_error=self._put_back)
        # Nothing was changed up to here, and what is changed from here on can be put back.
        setattr(base, _LEFT_BEHIND, self._put_back)
        self._undo = [lambda: delattr(base, _LEFT_BEHIND), lambda: setattr(optimizer, "optimizer", replaced)]
        self._undo.append(self._forward.remove)
        optimizer.optimizer = self.optimizer
        self._switch_attention(base)

    def on_step_begin(self, args, state, control, **kwargs):
        self._forward.install()
        inside = not (self.optimizer.in_line_search or self.optimizer.begins_outer_step)
        if inside and state.max_steps - state.global_step <= self.config.line_search_steps:
            self.optimizer.start_line_search()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self._forward.remove()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.optimizer is None or logs is None or "loss" not in logs or not self.optimizer.progress["outer_steps"]:
            return
        progress = self.optimizer.progress
        figures = {"gauss_newton/outer_step": progress["outer_steps"]}
        figures |= {f"gauss_newton/{name}": progress[name] for name in ("step_size", "loss")}
        logs.update(figures)
        state.log_history[-1].update(figures)

    def on_train_end(self, args, state, control, **kwargs):
        if not self.optimizer.begins_outer_step:
            logger.warning(
                "Gauss-Newton: training ended within an outer step; its last %d inner steps are not in the weights.",
                min(self.optimizer.progress["position"], self.config.inner_steps),
            )
        self._put_back()

    def _put_back(self) -> None:
        while self._undo:
            self._undo.pop()()
        self.optimizer = self._forward = None

    def _switch_attention(self, model: nn.Module) -> None:
        before = getattr(getattr(model, "config", None), "_attn_implementation", "eager")
        if before == "eager":
            return
        self._undo.append(lambda: model.set_attn_implementation(before))
        model.set_attn_implementation("eager")
        logger.warning("Gauss-Newton: attention %r has no forward-mode rule; training uses 'eager'.", before)


def take_over(optimizer, model: nn.Module, config: GaussNewtonConfig) -> GaussNewton:
    """Return a GaussNewton with the parameters and groups of `optimizer`, and its state if a checkpoint was loaded."""
    names = {id(p): name for name, p in model.named_parameters()}
    groups = [g | {"param_names": [names[id(p)] for p in g["params"]]} for g in optimizer.param_groups]
    stepped = {name for group in groups for name in group["param_names"]}
    taken = GaussNewton(
        groups,
        config,
        muon=matrix_names(model) if config.inner_optimizer == "muon" else None,
        # Trainer's groups put decayed parameters first.
        layers=layers_of(name for name, _ in model.named_parameters() if name in stepped),
    )
    if optimizer.state:
        taken.load_state_dict(optimizer.state_dict())
        optimizer.state.clear()
        optimizer.param_groups[0].pop("gauss_newton")
    return taken


def check_arguments(args, config: GaussNewtonConfig) -> None:
    """Refuse training arguments that Gauss-Newton cannot train with; raises ValueError."""
    refused = {
        "fp16": (args.fp16, "it trains in float32; leave it out"),
        "bf16": (args.bf16, "it trains in float32; pass bf16=False"),
        "gradient_checkpointing": (
            args.gradient_checkpointing,
            "recomputed activations lose their tangents; pass gradient_checkpointing=False and a smaller batch with "
            "gradient_accumulation_steps",
        ),
        "torch_compile": (args.torch_compile, "compiled graphs have no forward mode; leave it out"),
        "deepspeed": (args.deepspeed, "sharded parameters have no tangents; use DDP"),
        "fsdp": (args.fsdp, "sharded parameters have no tangents; use DDP"),
        "loss_type": (getattr(args, "loss_type", "nll") not in ("nll", "chunked_nll"), "use loss_type='nll'"),
        "max_grad_norm": (
            config.inner_optimizer == "cg" and args.max_grad_norm,
            "conjugate gradients solve for the unclipped gradient; pass max_grad_norm=0",
        ),
    }
    for name, (value, remedy) in refused.items():
        if value:
            raise ValueError(f"Gauss-Newton cannot train with {name}={getattr(args, name)!r}: {remedy}.")
    if args.n_gpu > 1:
        raise ValueError(
            f"Gauss-Newton cannot train with DataParallel on {args.n_gpu} GPUs: start one process a GPU with torchrun."
        )


def check_model(model: nn.Module) -> None:
    """Refuse models that Gauss-Newton cannot train: quantized, checkpointed or prompt-learning; raises ValueError."""
    base = base_model(model)
    if getattr(base, "is_quantized", False) or getattr(base, "quantization_method", None) is not None:
        raise ValueError(
            "Gauss-Newton cannot train on a quantized base model: its kernels have no forward mode. Load it without a "
            "quantization_config."
        )
    if any(getattr(module, "gradient_checkpointing", False) for module in base.modules()):
        raise ValueError(
            "Gauss-Newton cannot train with gradient checkpointing: recomputed activations lose their tangents. Call "
            "model.gradient_checkpointing_disable()."
        )
    if any(getattr(config, "is_prompt_learning", False) for config in getattr(model, "peft_config", {}).values()):
        raise ValueError("Gauss-Newton cannot train prompt-learning adapters: use LoRA, ScaLoRA or the whole model.")
