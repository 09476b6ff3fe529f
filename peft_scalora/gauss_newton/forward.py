"""A transformers model's forward pass, split into the outputs f and the loss ℓ that Gauss-Newton needs."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel
from transformers.loss.loss_utils import (
    ForCausalLMLoss,
    ForMaskedLMLoss,
    ForSequenceClassificationLoss,
    ForTokenClassification,
)

from .optimizer import GaussNewton

LogitsLoss = Callable[..., Tensor]  # (logits, labels, **what the model's forward was given for its loss) -> scalar
_LOSS_ARGUMENTS = ("num_items_in_batch", "shift_labels")
_IGNORED = -100


def base_model(model: nn.Module) -> nn.Module:
    """Return the transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def task_loss(model: nn.Module) -> LogitsLoss:
    """Return the loss that transformers computes from the logits of a model of this class.

    Raises:
        ValueError: names the class and how to give its loss.
    """
    base = base_model(model)
    known = isinstance(base, PreTrainedModel) and base.loss_type is not None and not base.config.is_encoder_decoder
    function = base.loss_function if known else None
    if function in (ForCausalLMLoss, ForMaskedLMLoss):
        return lambda logits, labels, **kwargs: function(logits, labels, vocab_size=logits.shape[-1], **kwargs)
    if function is ForSequenceClassificationLoss:
        return lambda logits, labels, **kwargs: function(labels, logits, config=base.config, **kwargs)
    if function is ForTokenClassification:
        return lambda logits, labels, **kwargs: function(logits, labels, config=base.config, **kwargs)
    raise ValueError(
        f"the loss of {type(base).__name__} is not known as a function of its logits: pass "
        "GaussNewtonCallback(config, loss=...) a function (logits, labels, **kwargs) -> scalar."
    )


class _Caller(nn.Module):
    """Module that calls a model's own forward with parameters of functional_call, while model.forward is replaced."""

    def __init__(self, model: nn.Module, forward: Callable):
        super().__init__()
        self.model = model
        self._own_forward = forward

    def forward(self, *args, **kwargs):
        return self._own_forward(*args, **kwargs)


class LinearizedForward:
    """Replacement of model.forward while Gauss-Newton trains: same arguments, and a loss that is the optimizer's.

    Outside training the model's own forward runs. The first batch is used to check that `loss` is what the model itself
    computes, so that a router loss, or a head that scales its logits, is not lost without a word. `on_error` is called
    where a training pass is interrupted or fails: Trainer tells no callback.

    Raises:
        ValueError: when called, if there are no labels or `loss` is not the model's own.
        NotImplementedError: when called, if an operation has no forward-mode rule; says what to switch off.
    """

    def __init__(self, model: nn.Module, optimizer: GaussNewton, loss: LogitsLoss, on_error: Callable[[], None]):
        self.model = model
        self.optimizer = optimizer
        self.loss = loss
        self._on_error = on_error
        self._installed = self._checked = False

    def install(self) -> None:
        self.remove()
        self._replaced = self.model.__dict__.get("forward")
        self.own_forward = own_forward = self.model.forward
        self._caller = _Caller(self.model, own_forward)

        @functools.wraps(own_forward)
        def forward(*args, **kwargs):
            if not (self.model.training and torch.is_grad_enabled()):
                return own_forward(*args, **kwargs)
            try:
                return self(*args, **kwargs)
            except BaseException:
                self._on_error()
                raise

        self.model.forward = forward
        self._installed = True

    def remove(self) -> None:
        if not self._installed:
            return
        del self.model.forward
        if self._replaced is not None:
            self.model.forward = self._replaced
        self._installed = False

    def __call__(self, *args, labels: Tensor | None = None, fused_lm_head: bool = False, **kwargs):
        if labels is None:
            raise ValueError(
                "Gauss-Newton got a training batch without labels: it needs the loss as a function of the logits. "
                "Leave compute_loss_func and label_smoothing_factor out, and pass the loss as "
                "GaussNewtonCallback(config, loss=...)."
            )
        loss_kwargs = {name: kwargs.pop(name) for name in _LOSS_ARGUMENTS if name in kwargs}
        if not self._checked:
            self._check_loss(args, kwargs, labels, loss_kwargs)
        if fused_lm_head:
            loss_kwargs["num_items_in_batch"] = 1  # a sum over tokens, which the caller divides
        outputs = None

        def forward(params: dict[str, Tensor]) -> Tensor:
            nonlocal outputs
            named = {f"model.{name}": tensor for name, tensor in params.items()}
            outputs = functional_call(self._caller, named, args, kwargs)
            return outputs["logits"]

        try:
            value = self.optimizer.loss(forward, functools.partial(self.loss, labels=labels, **loss_kwargs))
        except NotImplementedError as error:
            reason = str(error).partition("\n")[0]
            raise NotImplementedError(
                f"Gauss-Newton needs forward-mode differentiation, which a part of the model lacks ({reason}). Switch "
                "off fused kernels (attn_implementation='eager', no liger or hub kernels)."
            ) from error
        outputs["loss"] = value
        outputs["logits"] = outputs["logits"].detach()
        return _fused_output(outputs, labels, **loss_kwargs) if fused_lm_head else outputs

    @torch.no_grad()
    def _check_loss(self, args, kwargs, labels: Tensor, loss_kwargs: dict) -> None:
        with self.optimizer.unchanged_randomness():
            outputs = self.own_forward(*args, labels=labels, **kwargs, **loss_kwargs)
        own = outputs.get("loss")
        if own is not None:
            given = self.loss(outputs["logits"], labels=labels, **loss_kwargs)
            if not torch.isclose(own.float(), given.float(), rtol=1e-3, equal_nan=True):
                raise ValueError(
                    f"{type(base_model(self.model)).__name__} computes a loss of {float(own):.6g} where Gauss-Newton's "
                    f"function of its logits gives {float(given):.6g}: pass GaussNewtonCallback(config, loss=...) the "
                    "right one, and switch off auxiliary losses such as output_router_logits."
                )
        self._checked = True


def _fused_output(outputs, labels: Tensor, shift_labels: Tensor | None = None, **_):
    """Return the figures of each token that TRL's trainers ask their models for.

    SFTTrainer computes the loss from them, as minus the sum of the log-probabilities over a number. That loss is
    `outputs.loss`, here spread evenly over the tokens.
    """
    from trl.trainer.utils import FusedCausalLMOutput

    logits = outputs.logits if shift_labels is not None else outputs.logits[:, :-1]
    targets = shift_labels if shift_labels is not None else labels[:, 1:]
    mask = targets != _IGNORED
    log_p = logits.float().log_softmax(-1)
    return FusedCausalLMOutput(
        loss=outputs.loss,
        log_probs=_EvenLogProbabilities.apply(outputs.loss, mask),
        entropy=-(log_p.exp() * log_p).sum(-1) * mask,
        is_top1=(logits.argmax(-1) == targets) & mask,
        label_mask=mask,
    )


class _EvenLogProbabilities(torch.autograd.Function):
    """Function with the value -loss / tokens at every token of the mask.

    It is right for losses that weigh all tokens alike, and for no others.
    """

    @staticmethod
    def forward(ctx, loss: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(mask)
        return -loss * mask / mask.sum().clamp(min=1)

    @staticmethod
    def backward(ctx, upstream: Tensor):
        (mask,) = ctx.saved_tensors
        weights = upstream[mask]
        if (weights != weights[:1]).any():
            raise ValueError(
                "Gauss-Newton got a loss that does not weigh all tokens alike, as preference and reinforcement "
                "learning have: it trains with Trainer and with SFTTrainer's loss_type='nll' only."
            )
        return -weights.mean() if len(weights) else torch.zeros_like(upstream.sum()), None
