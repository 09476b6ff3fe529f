"""ScaLoRAConfig: its own fields, what it refuses of LoraConfig's, and its way through JSON."""

import copy
import dataclasses
import inspect
import json
import math

import pytest
import torch
from helpers_models import Linears, tiny_llama
from peft import LoraConfig, LoraRuntimeConfig, PeftConfig, get_peft_model
from peft.tuners import lora
from peft.tuners.lora.config import CordaConfig
from torch import nn

from peft_scalora import ScaLoRAConfig

OWN_FIELDS = {
    "scaling",
    "scaling_interval",
    "smoothness",
    "column_norm2",
    "accumulator",
    "accumulator_rank",
    "base_fingerprint",
    "requires",
}


def layer_ranks(**options):
    """(r, R) of both layers of a model whose weights are 18 x 14 and 10 x 18."""
    model = get_peft_model(Linears(), ScaLoRAConfig(target_modules=["lin0", "lin1"], **options))
    layers = (model.base_model.model.lin0, model.base_model.model.lin1)
    return [(layer.lora_A["default"].weight.shape[0], layer.scalora_V["default"].shape[0]) for layer in layers]


# Own fields.


def test_defaults():
    config = ScaLoRAConfig()
    assert (config.scaling, config.scaling_interval, config.smoothness) == ("shrink", 10, "auto")
    assert (config.accumulator, config.accumulator_rank) == ("auto", "auto")
    assert config.peft_type == "SCALORA"
    plain = LoraConfig()
    for field in dataclasses.fields(LoraConfig):
        if field.name != "peft_type":
            assert getattr(config, field.name) == getattr(plain, field.name), field.name


def test_every_own_field_is_documented():
    own = {f.name for f in dataclasses.fields(ScaLoRAConfig)} - {f.name for f in dataclasses.fields(LoraConfig)}
    assert own == OWN_FIELDS
    for field in dataclasses.fields(ScaLoRAConfig):
        if field.name in own:
            assert field.metadata["help"]
            assert field.name == "requires" or f"{field.name}:" in inspect.getdoc(ScaLoRAConfig)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("scaling", "column"),
        ("scaling", "scalar"),
        ("scaling", "exact"),
        ("scaling", "shrink"),
        ("column_norm2", 0.25),
        ("scaling_interval", 1),
        ("scaling_interval", 10**9),
        ("smoothness", "auto"),
        ("smoothness", 1),
        ("smoothness", 0.5),
        ("smoothness", 1e-30),
        ("accumulator", "factored"),
        ("accumulator_rank", "auto"),
        ("accumulator_rank", None),
        ("accumulator_rank", 1),
    ],
)
def test_valid_values(field, value):
    assert getattr(ScaLoRAConfig(**{field: value}), field) == value


@pytest.mark.parametrize(
    ("field", "value", "remedy"),
    [
        ("scaling", "columns", "one of 'column', 'scalar', 'exact', 'shrink'"),
        ("scaling", "", "one of 'column', 'scalar', 'exact', 'shrink'"),
        ("scaling", None, "one of 'column', 'scalar', 'exact', 'shrink'"),
        ("scaling", 1, "one of 'column', 'scalar', 'exact', 'shrink'"),
        ("scaling", ["column"], "one of 'column', 'scalar', 'exact', 'shrink'"),
        ("accumulator", "sparse", "one of 'auto'"),
        ("accumulator", None, "one of 'auto'"),
        ("accumulator", True, "one of 'auto'"),
        ("accumulator", "dense", "accumulator_rank of at least min"),
        ("scaling_interval", 0, "whole number, 1 or more"),
        ("scaling_interval", -1, "whole number, 1 or more"),
        ("scaling_interval", True, "whole number, 1 or more"),
        ("scaling_interval", 1.5, "whole number, 1 or more"),
        ("scaling_interval", 10.0, "whole number, 1 or more"),
        ("scaling_interval", "10", "whole number, 1 or more"),
        ("scaling_interval", None, "whole number, 1 or more"),
        ("accumulator_rank", 0, "whole number, 1 or more"),
        ("accumulator_rank", -8, "whole number, 1 or more"),
        ("accumulator_rank", False, "whole number, 1 or more"),
        ("accumulator_rank", 2.5, "whole number, 1 or more"),
        ("accumulator_rank", "8r", "whole number, 1 or more"),
        ("smoothness", -1, "positive number or 'auto'"),
        ("smoothness", 0, "positive number or 'auto'"),
        ("smoothness", math.nan, "positive number or 'auto'"),
        ("smoothness", math.inf, "positive number or 'auto'"),
        ("smoothness", "x", "positive number or 'auto'"),
        ("smoothness", "1.0", "positive number or 'auto'"),
        ("smoothness", True, "positive number or 'auto'"),
        ("smoothness", None, "positive number or 'auto'"),
    ],
)
def test_invalid_values_are_refused_by_name_value_and_remedy(field, value, remedy):
    with pytest.raises(ValueError, match=rf"(?s)^{field}=.*must be.*{remedy}") as caught:
        ScaLoRAConfig(**{field: value})
    assert repr(value) in str(caught.value)


# The rank of the accumulator.


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"r": 1}, [(1, 7), (1, 7)]),
        ({"r": 2}, [(2, 14), (2, 10)]),
        ({"r": 1, "accumulator_rank": None}, [(1, 8), (1, 8)]),
        ({"r": 4, "accumulator_rank": 9}, [(4, 9), (4, 9)]),
        ({"r": 4, "accumulator_rank": 12}, [(4, 12), (4, 10)]),
        ({"r": 4, "accumulator_rank": 10**6}, [(4, 14), (4, 10)]),
        ({"r": 1, "rank_pattern": {"lin1": 3}}, [(1, 7), (3, 10)]),
        ({"r": 4, "accumulator_rank": 1}, [(4, 1), (4, 1)]),
    ],
    ids=str,
)
def test_accumulator_rank_is_7_r_unless_given_and_never_above_the_weight(options, expected):
    assert layer_ranks(**options) == expected


# LoraConfig's fields that contradict the method.


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_dora", True),
        ("alora_invocation_tokens", [1, 2]),
        ("use_qalora", True),
        ("velora_config", lora.VeloraConfig()),
        ("monteclora_config", lora.MontecloraConfig()),
        ("use_bdlora", lora.BdLoraConfig(target_modules_bd_a=["lin0"])),
        ("arrow_config", lora.ArrowConfig()),
        ("kasa_config", lora.KasaConfig()),
        ("megatron_config", {"hidden_size": 1}),
        ("target_parameters", ["lin0.weight"]),
        ("eva_config", lora.EvaConfig()),
        ("corda_config", CordaConfig()),
        ("lora_ga_config", lora.LoraGAConfig()),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore")
def test_features_that_contradict_the_method_are_refused(field, value):
    with pytest.raises(ValueError, match=rf"(?s)ScaLoRA does not support {field}=.*: .+ Leave {field} out"):
        ScaLoRAConfig(**{field: value})


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "mica", "nonsense", "True", None, ""])
def test_initialisations_that_contradict_the_method_are_refused(init):
    with pytest.raises(ValueError, match=r"(?s)ScaLoRA does not support init_lora_weights=.*Use one of True, False"):
        ScaLoRAConfig(init_lora_weights=init)


@pytest.mark.parametrize("init", ["eva", "corda", "lora_ga"])
@pytest.mark.filterwarnings("ignore")
def test_initialisations_from_data_are_refused(init):
    with pytest.raises(ValueError, match=rf"ScaLoRA does not support ({init}_config|init_lora_weights='{init}')"):
        ScaLoRAConfig(init_lora_weights=init)


def test_loftq_is_refused():
    pytest.importorskip("scipy")
    with pytest.raises(ValueError, match="ScaLoRA does not support init_lora_weights='loftq'"):
        ScaLoRAConfig(init_lora_weights="loftq", loftq_config={"loftq_bits": 4})


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal"])
def test_initialisations_that_are_supported(init):
    assert ScaLoRAConfig(init_lora_weights=init).init_lora_weights is init


def test_every_field_of_lora_config_is_either_supported_or_refused():
    """A new field of a later PEFT has to be looked at: it may change what lora_B @ lora_A means."""
    refused = {
        "use_dora", "alora_invocation_tokens", "use_qalora", "velora_config", "monteclora_config", "use_bdlora",
        "arrow_config", "kasa_config", "megatron_config", "target_parameters", "eva_config", "corda_config",
        "lora_ga_config",
    }  # fmt: skip
    tested = {
        "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "use_rslora",
        "modules_to_save", "init_lora_weights", "layers_to_transform", "rank_pattern", "alpha_pattern",
        "trainable_token_indices", "layer_replication", "lora_bias", "ensure_weight_tying", "runtime_config",
        "layers_pattern",
    }  # fmt: skip
    without_effect_alone = {"megatron_core", "loftq_config", "qalora_group_size"}
    of_every_method = {f.name for f in dataclasses.fields(PeftConfig)} | {"task_type", "inference_mode", "revision"}
    fields = {f.name for f in dataclasses.fields(LoraConfig)} - of_every_method
    assert fields <= refused | tested | without_effect_alone


def test_refusals_hold_for_configurations_from_files(tmp_path):
    ScaLoRAConfig(target_modules=["lin0"]).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    for field, value in (("use_dora", True), ("scaling_interval", 0), ("init_lora_weights", "pissa")):
        content = json.loads(path.read_text())
        content[field] = value
        (tmp_path / "bad").mkdir(exist_ok=True)
        (tmp_path / "bad" / "adapter_config.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=field):
            PeftConfig.from_pretrained(tmp_path / "bad")


# Through JSON.


ROUND_TRIPS = [
    {},
    {
        "scaling": "exact",
        "scaling_interval": 3,
        "smoothness": 2.5,
        "accumulator": "factored",
        "accumulator_rank": 7,
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"q_proj": 4},
        "alpha_pattern": {"v_proj": 3},
        "modules_to_save": ["lm_head"],
        "exclude_modules": ["k_proj"],
        "use_rslora": True,
        "lora_bias": True,
        "layer_replication": [[0, 2], [1, 2]],
        "trainable_token_indices": [1, 2],
        "task_type": "CAUSAL_LM",
    },
    {"target_modules": "all-linear", "init_lora_weights": "gaussian", "smoothness": 3},
    {"target_modules": r".*\.(q|v)_proj", "layers_to_transform": None},
]


@pytest.mark.parametrize("options", ROUND_TRIPS, ids=range(len(ROUND_TRIPS)))
def test_round_trip_through_a_folder(tmp_path, options):
    config = ScaLoRAConfig(**options)
    config.save_pretrained(tmp_path)
    for cls in (PeftConfig, ScaLoRAConfig):
        loaded = cls.from_pretrained(tmp_path)
        assert type(loaded) is ScaLoRAConfig
        assert loaded.to_dict() == config.to_dict()
    loaded.save_pretrained(tmp_path / "again")
    for file in ("adapter_config.json", "README.md"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / file).read_bytes()


@pytest.mark.parametrize("options", ROUND_TRIPS, ids=range(len(ROUND_TRIPS)))
def test_round_trip_through_a_string(options):
    config = ScaLoRAConfig(**options)
    as_dict = {k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
    text = json.dumps(as_dict)
    assert json.loads(text)["peft_type"] == "SCALORA"
    assert PeftConfig.from_peft_type(**json.loads(text)).to_dict() == config.to_dict()


def test_copies():
    config = ScaLoRAConfig(target_modules=["q_proj"], smoothness=2.0, accumulator_rank=3)
    for twin in (copy.deepcopy(config), dataclasses.replace(config)):
        assert type(twin) is ScaLoRAConfig
        assert twin.to_dict() == config.to_dict()
    with pytest.raises(ValueError, match="scaling_interval=0"):
        dataclasses.replace(config, scaling_interval=0)


def test_model_does_not_change_the_configuration():
    config = ScaLoRAConfig(target_modules=["lin0"], r=2)
    before = config.to_dict()
    get_peft_model(Linears(), config)
    after = config.to_dict()
    assert {k: v for k, v in after.items() if before[k] != v} in ({}, {"base_model_name_or_path": None})


def test_type_hints_are_those_of_a_command_line_parser():
    """transformers' argument parser builds an option from every field."""
    hints = {field.name: field.type for field in dataclasses.fields(ScaLoRAConfig) if field.name in OWN_FIELDS}
    assert "Literal" in str(hints["scaling"])
    assert "Literal" in str(hints["accumulator"])
    assert "int" in str(hints["scaling_interval"])


# Beside plain LoRA.


def test_fresh_adapter_is_bit_for_bit_a_fresh_lora_adapter():
    """The same seed gives the same factors and as many trainable parameters, so comparisons are fair."""
    models = []
    for cls in (ScaLoRAConfig, LoraConfig):
        torch.manual_seed(5)
        models.append(get_peft_model(tiny_llama(), cls(r=3, target_modules=["q_proj", "v_proj", "embed_tokens"])))
    scalora, plain = (dict(model.named_parameters()) for model in models)
    assert scalora.keys() == plain.keys()
    for name, parameter in plain.items():
        assert torch.equal(scalora[name], parameter), name
        assert scalora[name].requires_grad == parameter.requires_grad
    assert models[0].get_nb_trainable_parameters() == models[1].get_nb_trainable_parameters()


def test_target_modules_default_to_loras_for_the_architecture():
    scalora = get_peft_model(tiny_llama(), ScaLoRAConfig())
    plain = get_peft_model(tiny_llama(), LoraConfig())
    assert scalora.targeted_module_names == plain.targeted_module_names != []


def test_runtime_configuration_is_kept():
    config = ScaLoRAConfig(target_modules=["lin0"], runtime_config=LoraRuntimeConfig(ephemeral_gpu_offload=True))
    model = get_peft_model(Linears(), config)
    assert model.base_model.model.lin0.ephemeral_gpu_offload is True


def test_layers_pattern():
    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Linears(), Linears()])

    config = ScaLoRAConfig(target_modules=["lin0"], layers_to_transform=[1], layers_pattern="layers")
    assert get_peft_model(Stack(), config).targeted_module_names == ["layers.1.lin0"]
