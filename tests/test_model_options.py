"""What else LoraConfig offers, what is refused on the model, and when saving warns."""

import copy
import warnings
from types import SimpleNamespace

import pytest
import torch
from helpers_adapters import WEIGHTS, save, two_adapters
from helpers_models import (
    KINDS,
    SCALE,
    Linears,
    check_filled,
    dense_weights,
    distance,
    fill,
    floats,
    oracle,
    output,
    saved_tensors,
    scalora_config,
    scalora_layers,
    tiny_llama,
    tokens,
    train,
    with_weights,
)
from peft import PeftModel, get_peft_model

from peft_scalora import rescale

# What else LoraConfig offers.


def llama_run(tmp_path, **options):
    """Fill an adapter with `options` on the tiny Llama, and check that saving and loading keeps its function."""
    base = tiny_llama().eval()
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(copy.deepcopy(base), scalora_config(**{"target_modules": ["q_proj", "v_proj"]} | options))
    fill(model, inputs=tokens())
    save(model, tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(output(loaded, tokens()), output(model, tokens()))
    return base, model


@pytest.mark.parametrize(
    "options",
    [
        {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"v_proj": 7}},
        {"use_rslora": True},
        {"lora_dropout": 0.3},
        {"exclude_modules": ["layers.0.self_attn.q_proj"]},
        {"target_modules": "all-linear"},
        {"target_modules": r".*layers\.1.*(q|v)_proj"},
        {"layers_to_transform": [1]},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [3, 5, 7]},
        {"bias": "all"},
        {"bias": "lora_only"},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "orthogonal"},
    ],
    ids=str,
)
def test_options_survive_saving(tmp_path, options):
    base, model = llama_run(tmp_path, **options)
    assert distance(output(model, tokens()), output(base, tokens())) > 0.02


def test_exclude_modules_and_layers_to_transform(tmp_path):
    _, model = llama_run(tmp_path, exclude_modules=["model.layers.0.self_attn.q_proj"])
    names = {name.removeprefix("base_model.model.model.layers.") for name in scalora_layers(model)}
    assert names == {"0.self_attn.v_proj", "1.self_attn.q_proj", "1.self_attn.v_proj"}


def test_bias_all_trains_base_biases():
    base, model = KINDS["Linear"].filled(bias="all")
    x = floats(5, 14)
    weights = dense_weights(base, saved_tensors(model), SCALE)
    for name in ("lin0", "lin1"):
        trained = model.base_model.model.get_submodule(name).base_layer.bias.detach()
        assert distance(trained, base.get_parameter(f"{name}.bias")) > 1e-3
        weights[f"{name}.bias"] = trained.double()
    assert distance(output(model, x), with_weights(base, weights, x)) < 1e-5


def test_trainable_tokens_and_an_adapted_embedding_together(tmp_path):
    base, model = llama_run(tmp_path, trainable_token_indices={"embed_tokens": [3, 5]})
    weights = dense_weights(base, saved_tensors(model), SCALE)
    rows = model.base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta["default"].detach().double()
    embeddings = base.model.embed_tokens.weight.detach().double().clone()
    embeddings[[3, 5]] = rows
    weights["model.embed_tokens.weight"] = embeddings
    assert (tokens() == 3).any() or (tokens() == 5).any()
    assert distance(output(model, tokens()), with_weights(base, weights, tokens())) < 1e-4


def test_layer_replication():
    base = tiny_llama().eval()
    config = scalora_config(target_modules=["q_proj", "v_proj"], layer_replication=[[0, 2], [0, 2]])
    model = fill(get_peft_model(copy.deepcopy(base), config), inputs=tokens())
    assert len(scalora_layers(model)) == 8
    replicated = tiny_llama(num_hidden_layers=4).eval()
    state = base.state_dict()
    replicated.load_state_dict(
        {
            k: state[k.replace("layers.2.", "layers.0.").replace("layers.3.", "layers.1.")]
            for k in replicated.state_dict()
        }
    )
    assert distance(output(model, tokens()), oracle(replicated, model, tokens())) < 1e-4


# Refused on the model.


def test_tensor_parallel_plan_is_refused():
    base = Linears()
    base.lin0._hf_tp_plan = "colwise"
    with pytest.raises(ValueError, match=r"tensor parallelism: lin0 has _hf_tp_plan='colwise'.*tp_plan"):
        get_peft_model(base, KINDS["Linear"].config())


def test_tensor_parallel_plan_of_the_whole_model_is_refused():
    """Where transformers keeps it since 5.17: plan and mesh on the model, nothing on its layers."""
    base = tiny_llama()
    base._tp_plan = {"model.layers.*.self_attn.q_proj": "colwise"}
    base._device_mesh = SimpleNamespace(ndim=1, mesh_dim_names=("tp",))
    base.config.distributed_config = SimpleNamespace(tp_size=2)
    with pytest.raises(ValueError, match=r"tensor parallelism: .*q_proj has .*colwise.*tp_plan"):
        get_peft_model(base, scalora_config(target_modules=["q_proj"]))


def test_tied_target_modules_are_refused():
    base = tiny_llama(tie_word_embeddings=True)
    config = scalora_config(target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True)
    with pytest.raises(ValueError, match=r"ensure_weight_tying=True.*ensure_weight_tying=False"):
        get_peft_model(base, config)


def test_ensure_weight_tying_without_tied_targets_is_fine():
    base = tiny_llama(tie_word_embeddings=True)
    model = get_peft_model(base, scalora_config(target_modules=["q_proj"], ensure_weight_tying=True))
    fill(model, inputs=tokens())


def test_conversion_of_an_initial_model_is_refused(tmp_path):
    _, model = KINDS["Linear"].filled()
    get_peft_model(Linears(), KINDS["Linear"].config()).save_pretrained(tmp_path / "init")
    with pytest.raises(ValueError, match=r"path_initial_model_for_weight_conversion.*export_lora"):
        model.save_pretrained(tmp_path / "out", path_initial_model_for_weight_conversion=str(tmp_path / "init"))


# Never silently plain LoRA.


def saves_with_warning(model, folder, adapter="default"):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.save_pretrained(folder)
    found = [str(w.message) for w in caught if "never rescaled" in str(w.message)]
    assert all(adapter in message and "peft_scalora.rescale" in message for message in found)
    return bool(found)


def steps_by_hand(model, x, steps=3):
    for _ in range(steps):
        model.zero_grad()
        output(model, x).square().mean().backward()
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.data -= 0.1 * parameter.grad


@pytest.mark.parametrize(
    ("name", "init"),
    [
        *[("Linear", init) for init in (True, "gaussian", False, "orthogonal")],
        *[("Embedding", True), ("Embedding", False), ("Conv2d", True), ("Conv2d", False), ("MultiheadAttention", True)],
    ],
)
def test_saving_an_adapter_that_nobody_rescaled_warns(tmp_path, name, init):
    kind = KINDS[name]
    model = get_peft_model(kind.build(), kind.config(init_lora_weights=init))
    assert not saves_with_warning(model, tmp_path / "fresh")
    steps_by_hand(model, kind.inputs())
    assert saves_with_warning(model, tmp_path / "trained")


@pytest.mark.parametrize("interval", [1, 3, 1000])
def test_saving_a_properly_trained_adapter_does_not_warn(tmp_path, interval):
    """Also before the first rescaling is due."""
    kind = KINDS["Linear"]
    model = get_peft_model(kind.build(), kind.config(scaling_interval=interval))
    train(model, kind.inputs(), 2)
    assert not saves_with_warning(model, tmp_path)
    loaded = PeftModel.from_pretrained(kind.build(), tmp_path)
    assert not saves_with_warning(loaded, tmp_path / "again")


def test_rescaling_by_hand_does_not_warn(tmp_path):
    """The remedy that the warning names silences it."""
    kind = KINDS["Linear"]
    model = get_peft_model(kind.build(), kind.config())
    x = kind.inputs()
    for _ in range(3):
        model.zero_grad()
        output(model, x).square().mean().backward()
        rescale(model)
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.data -= 0.1 * parameter.grad
    check_filled(model)
    assert not saves_with_warning(model, tmp_path)


def test_the_warning_names_the_adapter_and_spares_the_others(tmp_path):
    kind = KINDS["Linear"]
    model = get_peft_model(kind.build(), kind.config())
    model.add_adapter("by_hand", kind.config())
    fill(model)
    model.set_adapter("by_hand")
    steps_by_hand(model, kind.inputs())
    assert saves_with_warning(model, tmp_path, "by_hand")
    model.delete_adapter("by_hand")
    model.set_adapter("default")
    assert not saves_with_warning(model, tmp_path)


def test_combined_adapters_do_not_warn(tmp_path):
    _, model, _ = two_adapters("Linear")
    model.add_weighted_adapter(["default", "other"], WEIGHTS, "sum", combination_type="svd")
    assert not saves_with_warning(model, tmp_path)
