"""Every part of another library that this package relies on although that library promises nothing about it.

A row of SEAMS names the library, the part ("module:attribute"), and why it is needed. `source` holds pieces of that
part's source, in their order: what it has to go on doing. `digest` is that of the whole source, for what the package
writes anew. A break that would be silent, such as an overridden method that is not called any more, is thus found by
tests/test_seams.py (`make seams` runs it against the newest releases). Rows are checked without importing a library
that is not needed: importing peft_scalora stays cheap.
"""

from __future__ import annotations

import hashlib
import inspect
import sys
from importlib import import_module
from importlib.metadata import version
from typing import Any, NamedTuple

# The releases in which the rows below were read.
READ_IN = {
    "accelerate": "1.15.0",
    "bitsandbytes": "0.50.2",
    "deepspeed": "0.19.8",
    "diffusers": "0.42.1",
    "huggingface_hub": "2.4.0",
    "optuna": "5.0.0",
    "peft": "0.21.2",
    "torch": "2.13.0",
    "transformers": "5.23.0",
    "trl": "1.16.0",
}


class SeamError(ImportError):
    """Error of a library that lacks something which this package relies on."""


class Seam(NamedTuple):
    name: str
    why: str
    source: tuple[str, ...] = ()
    digest: str = ""

    @property
    def library(self) -> str:
        return self.name.partition(".")[0].partition(":")[0]


def _calls(name: str, call: str) -> Seam:
    """Return the row of a part that has to make a call, such as "self._hook("."""
    return Seam(name, f"has to call {call}...)", (call,))


_MODEL = "peft.tuners.lora.model:LoraModel"
_LAYER = "peft.tuners.lora.layer"
_TUNER = "peft.tuners.tuners_utils:BaseTuner"
_SAVE = "peft.utils.save_and_load:get_peft_model_state_dict"
_LOAD = "peft.utils.save_and_load:set_peft_model_state_dict"
_TRAINER = "transformers.trainer:Trainer"
_CALLBACKS = "transformers.trainer_callback"

_PEFT = (
    # Registering a method.
    Seam("peft.mapping:PEFT_TYPE_TO_CONFIG_MAPPING", "is extended by register.py"),
    Seam("peft.mapping:PEFT_TYPE_TO_TUNER_MAPPING", "is extended by register.py"),
    Seam("peft.mapping:PEFT_TYPE_TO_PREFIX_MAPPING", "is extended by register.py"),
    Seam(
        "peft.utils.hotswap:CONFIG_KEYS_TO_CHECK", "is extended by register.py: fields that hotswapped adapters share"
    ),
    # Methods of LoraModel that ScaLoRAModel overrides, and who calls them: what a rename would turn off in silence.
    Seam(f"{_MODEL}._pre_injection_hook", "is overridden to take the base model's fingerprint"),
    _calls(f"{_TUNER}.__init__", "self._pre_injection_hook("),
    Seam(f"{_MODEL}._create_and_replace", "is overridden to refuse tied targets and tensor parallelism"),
    _calls(f"{_TUNER}.inject_adapter", "self._create_and_replace("),
    Seam(f"{_MODEL}._create_new_module", "is overridden to make PEFT's new layer a ScaLoRA layer"),
    _calls(f"{_MODEL}._create_and_replace", "self._create_new_module(lora_config, adapter_name, target,"),
    Seam(
        f"{_MODEL}._get_adapter_state_dict",
        "is overridden to record the fingerprint, and warn of layers that never rescaled",
    ),
    _calls(_SAVE, "tuner_cls._get_adapter_state_dict("),
    Seam(
        f"{_MODEL}._remap_adapter_state_dict_for_load", "is overridden to check loaded values, and refuse base weights"
    ),
    _calls(_LOAD, "tuner_cls._remap_adapter_state_dict_for_load("),
    Seam(f"{_MODEL}._convert_state_dict_for_initial_model", "is overridden by a refusal"),
    _calls("peft.peft_model:PeftModel.save_pretrained", "tuner_cls._convert_state_dict_for_initial_model("),
    Seam(
        f"{_MODEL}._unload_and_optionally_merge",
        "is overridden to warn of layers that never rescaled, and of requantization",
    ),
    _calls(f"{_TUNER}.merge_and_unload", "self._unload_and_optionally_merge("),
    Seam(f"{_TUNER}._check_target_module_compatiblity", "is overridden to refuse layers of Mamba that LoRA refuses"),
    _calls(f"{_TUNER}.inject_adapter", "self._check_target_module_compatiblity("),
    # Methods of LoraLayer that ScaLoRALayer overrides or calls.
    Seam(f"{_LAYER}:LoraLayer.update_layer", "is overridden to add the accumulator", ("config: LoraConfig",)),
    Seam(
        f"{_LAYER}:LoraLayer._move_adapter_to_device_of_base_layer",
        "is overridden to move the accumulator with the factors",
    ),
    _calls(_LOAD, "module._move_adapter_to_device_of_base_layer(adapter_name)"),
    Seam(f"{_LAYER}:LoraLayer._cast_input_dtype", "is what the fused forward casts inputs with"),
    Seam(f"{_LAYER}:Embedding._get_embed_scale", "scales the accumulated output as PEFT does the factors'"),
    Seam(f"{_LAYER}:LoraLayer.__init__", "names what a layer holds", ("self.lora_variant",)),
    Seam(f"{_LAYER}:Linear.forward", "is written anew, fused, by layer.py", digest="6258e443c7a12107"),
    Seam(f"{_LAYER}:VARIANT_KWARG_KEYS", "are arguments of the layer that are not the base layer's"),
    Seam(f"{_LAYER}:LoraLayer.other_param_names", "is what an adapter has beside its factors"),
    # Functions and constants.
    Seam(
        "peft.tuners.lora.conversion:_convert_module_to_lora",
        "is patched: convert_to_lora is exact for ScaLoRA layers",
        ("module", "rank", "adapter_name"),
    ),
    _calls("peft.tuners.lora.conversion:convert_to_lora", "convert_module_to_lora = _convert_module_to_lora"),
    Seam("peft.utils.save_and_load:_validate_lora_adapter_state_dict", "warns of factors that were not gathered"),
    Seam(
        "peft.utils.transformers_weight_conversion:convert_peft_config_for_transformers",
        "turns the experts that are targeted into target_parameters",
        ("def convert_peft_config_for_transformers(peft_config, model", "!= PeftType.LORA"),
    ),
    Seam("peft.config:PeftConfigMixin._split_kwargs", "separates the arguments of a download from the others"),
    Seam("peft.tuners.lora.config:LoraConfig._register_custom_module", "sets _custom_modules", ("_custom_modules",)),
    Seam("peft.utils.constants:SEQ_CLS_HEAD_NAMES", "are heads that PEFT trains whole"),
    Seam("peft.utils.integrations:dequantize_module_weight", "gives the values of a quantized weight"),
    Seam("peft.utils.other:get_pattern_key", "matches rank_pattern and alpha_pattern"),
)
_TORCH = (
    Seam("torch:_foreach_add_", "adds to many small tensors in one call"),
    Seam("torch:_foreach_copy_", "writes many small tensors in one call"),
    Seam("torch:_foreach_zero_", "zeroes many small tensors in one call"),
    Seam("torch._C:_are_functorch_transforms_active", "says whether vmap, jvp and the like are tracing"),
    Seam("torch._C._nn:silu", "is what F.silu dispatches to"),
    Seam("torch._C._nn:gelu", "is what F.gelu dispatches to"),
    Seam("torch.nn:Module._apply", "is overridden by held.py, whose tensors keep their dtype"),
    Seam("torch.nn:Module._load_from_state_dict", "is overridden to read adapters of older releases"),
    Seam("torch.nn:Module._save_to_state_dict", "is overridden to save a base weight without the change it carries"),
    _calls("torch.nn:Module.state_dict", "self._save_to_state_dict("),
    _calls("torch.nn:Module.load_state_dict", "module._load_from_state_dict("),
    _calls("torch.nn:Module.to", "self._apply(convert)"),
    Seam(
        "torch.nn:Module.__init__",
        "names parameters, children, and the hooks with which a linear layer is more than F.linear",
        ("_parameters", "_backward_pre_hooks", "_backward_hooks", "_forward_hooks", "_forward_pre_hooks", "_modules"),
    ),
    *(Seam(f"torch.nn:Conv{d}d._conv_forward", "convolves with another kernel than the layer's") for d in (1, 2, 3)),
    Seam(
        "torch.optim:Optimizer.profile_hook_step",
        "runs the step hooks from a frame whose args begin with the optimizer",
        ("def wrapper(*args", "_global_optimizer_pre_hooks", "pre_hook(self, args, kwargs)", "func(*args, **kwargs)"),
    ),
)
_TRANSFORMERS = (
    Seam(
        f"{_TRAINER}._run_epoch",
        "clips between two events, reading max_grad_norm there",
        (
            "callback_handler.on_step_begin(",
            "self.args.max_grad_norm > 0",
            "callback_handler.on_pre_optimizer_step(",
            "self.optimizer.step()",
            "callback_handler.on_step_end(",
            "self._maybe_log_save_evaluate(",
        ),
    ),
    Seam(
        f"{_TRAINER}.log",
        "puts a copy of the logs last in log_history, before callbacks see them",
        ("self.state.log_history.append(", "callback_handler.on_log("),
    ),
    Seam(
        f"{_CALLBACKS}:CallbackHandler.call_event",
        "gives one dictionary of logs to all callbacks, in the order of its list",
        ("for callback in self.callbacks", "**kwargs"),
    ),
    Seam(f"{_TRAINER}.__init__", "sets what finetuning overwrites", ("self.model_accepts_loss_kwargs",)),
    Seam(f"{_TRAINER}.training_step", "divides a loss by it", ("self.model_accepts_loss_kwargs",)),
    Seam(f"{_CALLBACKS}:ExportableState", "keeps a callback's state in checkpoints"),
    *(
        Seam(f"transformers.loss.loss_utils:For{loss}", "is known as a function of the logits")
        for loss in ("CausalLMLoss", "MaskedLMLoss", "SequenceClassificationLoss", "TokenClassification")
    ),
    Seam("transformers:PreTrainedModel.loss_function", "is the loss that a model computes"),
    Seam("transformers.quantizers.base:HfQuantizer.remove_quantization_config", "makes a model an unquantized one"),
)
# Trainers that can send an adapter alone to a generation server.
TRL_ASYNC = tuple(f"trl.experimental.async_{name}.async_{name}_trainer" for name in ("grpo", "distillation"))
_SENT = "is replaced by sync.py, so that ScaLoRA adapters are sent as plain LoRA"
_OTHERS = (
    Seam("accelerate.optimizer:AcceleratedOptimizer.step", "steps the optimizer inside", ("self.optimizer.step(",)),
    Seam("bitsandbytes.nn.modules:Linear4bit.__init__", "decides on repacking", ("self.support_avx512bf16_for_cpu",)),
    Seam("bitsandbytes.nn.modules:Linear4bit.forward", "repacks", ("self.support_avx512bf16_for_cpu",)),
    Seam("bitsandbytes.nn.modules:Linear4bit.forward", "marks what it repacked", ("packing_format_for_cpu",)),
    Seam("bitsandbytes.optim.optimizer:Optimizer2State.init_state", "has this block size", ("blocksize = 256",)),
    Seam("bitsandbytes.optim.optimizer:Optimizer1State.init_state", "has this block size", ("blocksize = 256",)),
    Seam("deepspeed.runtime.engine:DeepSpeedEngine._take_model_step", "is patched to rescale before a step"),
    _calls("deepspeed.runtime.engine:DeepSpeedEngine.step", "self._take_model_step("),
    Seam(
        "deepspeed.runtime.zero.partition_parameters:Init._convert_to_deepspeed_param",
        "sets ds_id",
        ("ds_shape", "ds_id"),
    ),
    Seam(
        "deepspeed.utils.mixed_precision_linkage:_init_lp_to_hp_mapping",
        "marks a parameter of ZeRO-1, 2",
        ("_dp_group",),
    ),
    Seam("diffusers.loaders.lora_base:LoraBaseMixin", "writes LoRA files for pipelines", ("def write_lora_layers(",)),
    Seam("diffusers.loaders.peft:PeftAdapterMixin", "writes LoRA files for models", ("def save_lora_adapter(",)),
    Seam("optuna.storages:RDBStorage.get_trial_id_from_study_id_trial_number", "names what a heartbeat is of"),
    Seam("optuna.storages:RDBStorage.record_heartbeat", "marks a trial as alive"),
    Seam("optuna.storages:fail_stale_trials", "ends the trials of processes that died"),
    *(Seam(f"{name}:save_lora_adapter", _SENT, ("(model", "adapter_name", "dest_dir")) for name in TRL_ASYNC),
    *(Seam(f"{name}:validate_lora_for_vllm_sync", _SENT, ("(model", "return peft_config")) for name in TRL_ASYNC),
    *(_calls(f"{name}:select_adapter_sync", "validate_lora_for_vllm_sync(") for name in TRL_ASYNC),
    Seam("trl.trainer.utils:FusedCausalLMOutput", "is what SFTTrainer asks a model with a fused head for"),
    Seam(
        "trl.trainer.sft_trainer:SFTTrainer",
        "takes a fused head's loss for minus the sum of its log-probabilities",
        ("per_token_loss = -outputs.log_probs",),
    ),
    *(
        _calls(f"trl.scripts.{script}:main", "peft_config=get_peft_config(model_args")
        for script in ("sft", "dpo", "grpo", "kto", "reward", "rloo", "distillation")
    ),
)
SEAMS = (*_PEFT, *_TORCH, *_TRANSFORMERS, *_OTHERS)


def find(seam: Seam) -> Any:
    """Return the part of another library that a row names.

    Raises:
        SeamError: it is not there; names library, version, part, reason and remedy.
    """
    module, _, path = seam.name.partition(":")
    try:
        part = import_module(module)
        for attribute in path.split("."):
            part = getattr(part, attribute)
    except (ImportError, AttributeError) as error:
        raise SeamError(_message(seam, "lacks a part")) from error
    return part


def check(seam: Seam) -> None:
    """Check that a part is there and does what its row says.

    Raises:
        SeamError: names library, version, part, reason and remedy.
    """
    part = find(seam)
    if not (seam.source or seam.digest):
        return
    source = inspect.getsource(part)
    if seam.digest and seam.digest != digest(source):
        raise SeamError(_message(seam, f"has changed a part (digest {digest(source)})"))
    start = 0
    for piece in seam.source:
        start = source.find(piece, start)
        if start < 0:
            raise SeamError(_message(seam, f"has changed a part ({piece!r} is not at its place)"))


def check_loaded() -> None:
    """Check that the parts of all modules that are loaded by now are there.

    Raises:
        SeamError: as `find`.
    """
    for seam in SEAMS:
        if seam.name.partition(":")[0] in sys.modules:
            find(seam)


def digest(source: str) -> str:
    """Return a digest of Python source that ignores comments on lines of their own, and whitespace."""
    lines = [line for line in source.splitlines() if not line.lstrip().startswith("#")]
    return hashlib.sha256("".join("".join(lines).split()).encode()).hexdigest()[:16]


def _message(seam: Seam, problem: str) -> str:
    library = seam.library
    return (
        f"{library} {version(library)} {problem}: {seam.name}, which {seam.why}. peft-scalora relies on it. Install "
        f"{library}=={READ_IN[library]}, in which that was read, or a newer peft-scalora."
    )


def take(name: str) -> Any:
    """Return the part that the row of that name lists; raises as `find`."""
    return find(next(seam for seam in SEAMS if seam.name == name))


# What the package imports. The rest is overridden, called on objects, or imported when a library is in use.
SEQ_CLS_HEAD_NAMES = take("peft.utils.constants:SEQ_CLS_HEAD_NAMES")
VARIANT_KWARG_KEYS = take(f"{_LAYER}:VARIANT_KWARG_KEYS")
dequantize_module_weight = take("peft.utils.integrations:dequantize_module_weight")
get_pattern_key = take("peft.utils.other:get_pattern_key")
# Of the function that torch puts around every optimizer's step, to run the hooks.
STEP_CODE = take("torch.optim:Optimizer.profile_hook_step")(lambda: None).__code__
