"""What PEFT, transformers, TRL, diffusers and accelerate do for adapters of type LORA alone, and what becomes of it."""

import ast
import copy
import importlib.util
import re
import warnings
from pathlib import Path

import peft
import pytest
import torch
import transformers as t
from helpers_models import KINDS, dense_weights, distance, fill, floats, output, saved_tensors, scalora_config, tokens
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict

from peft_scalora import ScaLoRAConfig, export_lora

# (file, function or class) -> what becomes of it for ScaLoRA. A new entry has to be handled, refused or explained.
COMPARISONS = {
    ("peft/mapping_func.py", "get_peft_model"): "warns of EVA without low_cpu_mem_usage; eva_config is refused",
    ("peft/peft_model.py", "save_pretrained"): "path_initial_model_for_weight_conversion, refused (test_model_saving)",
    ("peft/peft_model.py", "_get_peft_specific_model_tags"): "a tag of the card; harmless, the card says it is ScaLoRA",
    ("peft/tuners/lora/config.py", "__post_init__"): "sets the type; ScaLoRAConfig sets its own after it",
    ("peft/tuners/lora/conversion.py", "convert_to_lora"): "warns that LoRA need not be converted; ScaLoRA is exact",
    ("peft/tuners/lora/intruders.py", "reduce_intruder_dimension"): "refuses every other type by name",
    ("peft/tuners/mixed/model.py", None): "types of PeftMixedModel, which refuses every other by name",
    ("peft/tuners/tuners_utils.py", "_check_lora_target_modules_mamba"): "called for ScaLoRA too (below)",
    ("peft/utils/hotswap.py", None): "register.py adds an entry (test_model_hotswap)",
    ("peft/utils/peft_types.py", "PeftType"): "the definition of the type",
    ("peft/utils/save_and_load.py", "get_peft_model_state_dict"): "warns of partial factors; done too (below)",
    ("peft/utils/transformers_weight_conversion.py", "convert_peft_config_for_transformers"): "refused (below)",
    ("peft/utils/transformers_weight_conversion.py", "convert_peft_adapter_state_dict_for_transformers"): (
        "converts the factors of fused experts, which ScaLoRA adapters do not have"
    ),
    ("transformers/integrations/peft.py", "load_adapter"): "load_adapter(hotswap=True) refuses other types by name",
    ("trl/experimental/sdft/teacher_sync.py", "is_pure_lora_training"): "off: the teacher is a copy of the model",
    ("trl/experimental/sdpo/teacher_sync.py", "is_pure_lora_training"): "off: the teacher is a copy of the model",
}
LIBRARIES = ("peft", "transformers", "trl", "diffusers", "accelerate")


def is_lora_type(node: ast.AST) -> bool:
    if isinstance(node, ast.Attribute):
        return node.attr == "LORA" and isinstance(node.value, ast.Name) and node.value.id == "PeftType"
    return isinstance(node, ast.Constant) and node.value == "LORA"


def comparisons(path: Path) -> set[str | None]:
    """Return the innermost functions or classes of a module that name the type LORA; None for the module itself."""
    found = set()

    def walk(node: ast.AST, scope: str | None) -> None:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            scope = node.name
        is_definition = isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "LORA"
        if is_lora_type(node) or is_definition:
            found.add(scope)
        for child in ast.iter_child_nodes(node):
            walk(child, scope)

    walk(ast.parse(path.read_text(encoding="utf-8")), None)
    return found


def test_every_comparison_with_the_type_lora_is_known():
    found = set()
    for library in LIBRARIES:
        root = Path(importlib.util.find_spec(library).origin).parent
        for path in root.rglob("*.py"):
            if re.search(r"PeftType\.LORA\b|[\"']LORA[\"']", path.read_text(encoding="utf-8")):
                found |= {(path.relative_to(root.parent).as_posix(), scope) for scope in comparisons(path)}
    assert found - COMPARISONS.keys() == set(), "new: handle, refuse or explain it for ScaLoRA"
    assert COMPARISONS.keys() - found == set(), "gone"


# Experts in fused parameters.

MIXTURE = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "num_experts_per_tok": 2,
}  # fmt: skip


def mixtral():
    return t.MixtralForCausalLM(t.MixtralConfig(**MIXTURE, num_local_experts=2))


def qwen3_moe():
    config = t.Qwen3MoeConfig(**MIXTURE, num_experts=2, moe_intermediate_size=12, head_dim=8)
    return t.Qwen3MoeForCausalLM(config)


EXPERTS = [
    (mixtral, ["q_proj", "w1", "w2", "w3"]),
    (mixtral, ["w2"]),
    (mixtral, ["q_proj", "w1"]),
    (mixtral, "all-linear"),
    (mixtral, r".*\.(q_proj|w1|w3)"),
    (qwen3_moe, ["q_proj", "gate_proj", "up_proj", "down_proj"]),
    (qwen3_moe, "all-linear"),
]


@pytest.mark.parametrize("build, targets", EXPERTS)
def test_fused_experts_are_refused_by_name(build, targets):
    with pytest.raises(ValueError, match=r"fused .*(gate_up_proj|down_proj).* left out.*target_modules.*LoraConfig"):
        get_peft_model(build(), scalora_config(target_modules=targets))


@pytest.mark.parametrize("build", [mixtral, qwen3_moe])
def test_the_remedy_for_fused_experts_works(build):
    with pytest.raises(ValueError, match="all-linear") as error:
        get_peft_model(build(), scalora_config(target_modules="all-linear"))
    targets = ast.literal_eval(re.search(r"target_modules=(\[[^]]*\]), or", str(error.value)).group(1))
    assert targets == ["k_proj", "o_proj", "q_proj", "v_proj"]
    fill(get_peft_model(build(), scalora_config(target_modules=targets)), inputs=tokens())


def test_a_saved_adapter_without_the_experts_still_loads():
    config = scalora_config(target_modules=["q_proj", "w1", "w2", "w3"], base_fingerprint={"weights": "", "values": []})
    with pytest.warns(UserWarning, match="fused parameters"):
        get_peft_model(mixtral(), config)


def test_layers_of_mamba_that_lora_refuses_are_refused():
    """Its kernels read the weights of these layers, past any adapter."""
    settings = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    model = t.MambaForCausalLM(t.MambaConfig(**settings))
    with pytest.raises(ValueError, match=r"out_proj.*incompatible with Mamba"):
        get_peft_model(model, scalora_config(target_modules=["in_proj", "out_proj"]))


@pytest.mark.parametrize("shape", [(0,), (0, 18), (36,)])
def test_saving_factors_that_were_not_gathered_warns(shape):
    """As under DeepSpeed ZeRO-3, where a process holds empty tensors, or a part of them flattened."""
    model = get_peft_model(KINDS["Linear"].build(), KINDS["Linear"].config())
    state = {name: torch.zeros(shape) if "lora_A" in name else p for name, p in model.state_dict().items()}
    with pytest.warns(UserWarning, match="invalid shape"):
        get_peft_model_state_dict(model, state_dict=state)


# peft.convert_to_lora.

CONVERTED = [
    ({}, 64), ({}, 8), ({}, 1.0), ({"use_rslora": True}, 64), ({"accumulator_rank": 64}, 64),
    ({"accumulator_rank": 64}, 1.0),
]  # fmt: skip


def lora_from(base, config: LoraConfig, state: dict[str, torch.Tensor]) -> PeftModel:
    model = get_peft_model(copy.deepcopy(base), config).eval()
    result = peft.set_peft_model_state_dict(model, state)
    assert not result.unexpected_keys
    return model


@pytest.mark.parametrize("options, rank", CONVERTED)
def test_conversion_to_lora_is_exact(options, rank):
    base, model = KINDS["Linear"].filled(**options)
    config, state = peft.convert_to_lora(model, rank=rank)
    assert all(tensor.dtype == torch.float32 for tensor in state.values())
    x = floats(5, 14)
    scale = 3 / 2**0.5 if options.get("use_rslora") else 1.5
    dense = dense_weights(base, saved_tensors(model), scale)
    for layer in ("lin0", "lin1"):
        factors = [state[f"base_model.model.{layer}.lora_{part}.weight"].double() for part in "BA"]
        change = dense[f"{layer}.weight"] - base.get_submodule(layer).weight.double()
        assert distance(factors[0] @ factors[1], change) < 1e-6
        if not options:
            assert factors[1].shape[0] <= 2 + 5, "rank r + columns in use"
    assert distance(output(lora_from(base, config, state), x), output(model, x)) < 1e-5


def test_conversion_of_half_precision_factors_is_not_rounded_again():
    _, model = KINDS["Linear"].filled()
    model = model.to(torch.bfloat16)
    layer = model.base_model.model.lin0
    U, V = layer.scalora_U["default"], layer.scalora_V["default"]
    lora_B, lora_A = (factor.detach().float() for factor in layer.factors("default"))
    _, state = peft.convert_to_lora(model, rank=8)
    factors = [state[f"base_model.model.lin0.lora_{part}.weight"] for part in "BA"]
    assert distance(factors[0] @ factors[1], 1.5 * lora_B @ lora_A + U @ V) < 1e-6


@pytest.mark.parametrize("rank", [3, 0.9])
def test_conversion_to_a_lower_rank_is_the_best_of_that_rank(rank):
    base, model = KINDS["Linear"].filled()
    _, state = peft.convert_to_lora(model, rank=rank)
    dense = dense_weights(base, saved_tensors(model), 1.5)
    for layer in ("lin0", "lin1"):
        change = dense[f"{layer}.weight"] - base.get_submodule(layer).weight.double()
        sigma = torch.linalg.svdvals(change.detach())
        kept = sigma.square().cumsum(0) / sigma.square().sum()
        lora_B, lora_A = (state[f"base_model.model.{layer}.lora_{part}.weight"].double() for part in "BA")
        expected = rank if isinstance(rank, int) else int((kept < rank).sum()) + 1
        assert lora_A.shape[0] == expected
        error = (lora_B @ lora_A - change).norm()
        assert float(error.detach()) == pytest.approx(float(sigma[expected:].norm()), rel=1e-4)


def test_conversion_with_a_trained_bias_is_refused():
    model = get_peft_model(KINDS["Linear"].build(), KINDS["Linear"].config(lora_bias=True))
    with pytest.raises(ValueError, match=r"lora_bias=True.*export_lora"):
        peft.convert_to_lora(model, rank=8)


def test_conversion_of_other_methods_is_left_alone():
    model = get_peft_model(KINDS["Linear"].build(), LoraConfig(target_modules=["lin0"], init_lora_weights=False))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, state = peft.convert_to_lora(model, rank=3)
    assert state["base_model.model.lin0.lora_A.weight"].shape[0] == 3


# diffusers.

diffusers = pytest.importorskip("diffusers")
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


def tiny_unet():
    torch.manual_seed(3)
    return diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8,), norm_num_groups=2,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",), cross_attention_dim=8,
        attention_head_dim=2,
    ).eval()  # fmt: skip


def noise_of(unet) -> torch.Tensor:
    return unet(floats(2, 4, 8, 8), torch.tensor([3, 5]), floats(2, 3, 8)).sample


@pytest.fixture(scope="module")
def unet():
    """A UNet that carries a rescaled adapter on its attention, as diffusers' training scripts add it."""
    unet = tiny_unet()
    unet.requires_grad_(False)
    unet.add_adapter(
        ScaLoRAConfig(
            r=2, lora_alpha=3, scaling="column", scaling_interval=1, accumulator_rank=5, target_modules=ATTENTION
        )
    )
    optimizer = torch.optim.AdamW([p for p in unet.parameters() if p.requires_grad], lr=2e-2)
    for step in range(6):
        optimizer.zero_grad()
        noise = noise_of(unet)
        (noise - torch.randn(noise.shape, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        optimizer.step()
    assert distance(noise_of(unet), noise_of(tiny_unet())) > 0.05
    return unet


@pytest.fixture(scope="module")
def exported(unet, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unet") / "plain"
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="diffusers writes")
        export_lora(unet, folder)
    return folder


def test_an_exported_adapter_loads_into_a_unet(unet, exported):
    loaded = tiny_unet()
    loaded.load_lora_adapter(exported, prefix="base_model.model", weight_name="adapter_model.safetensors")
    assert distance(noise_of(loaded), noise_of(unet)) < 1e-5


def test_an_exported_adapter_loads_into_a_pipeline(unet, exported):
    from safetensors.torch import load_file

    state = load_file(exported / "adapter_model.safetensors")
    state = {key.replace("base_model.model.", "unet.", 1): tensor for key, tensor in state.items()}
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    pipeline = diffusers.StableDiffusionPipeline(
        **parts, unet=tiny_unet(), scheduler=diffusers.DDIMScheduler(), requires_safety_checker=False
    )
    pipeline.load_lora_weights(state)
    assert distance(noise_of(pipeline.unet), noise_of(unet)) < 1e-5


def test_a_pipeline_file_of_a_scalora_adapter_warns(unet, tmp_path):
    """In such a file diffusers finds plain LoRA: another adapter."""
    state = get_peft_model_state_dict(unet)
    with pytest.warns(UserWarning, match=r"diffusers writes.*export_lora.*load_lora_adapter"):
        diffusers.StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=state)
    loaded = tiny_unet()
    read, alphas = diffusers.StableDiffusionPipeline.lora_state_dict(tmp_path)
    diffusers.StableDiffusionPipeline.load_lora_into_unet(read, network_alphas=alphas, unet=loaded)
    assert distance(noise_of(loaded), noise_of(unet)) > 0.01


def test_a_model_file_of_a_scalora_adapter_warns(unet, tmp_path):
    with pytest.warns(UserWarning, match=r"diffusers writes.*export_lora.*load_lora_adapter"):
        unet.save_lora_adapter(tmp_path)


def test_files_of_plain_lora_do_not_warn(tmp_path):
    plain = tiny_unet()
    plain.add_adapter(LoraConfig(r=2, target_modules=ATTENTION))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="diffusers writes")
        plain.save_lora_adapter(tmp_path)
        state = get_peft_model_state_dict(plain)
        diffusers.StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=state)
