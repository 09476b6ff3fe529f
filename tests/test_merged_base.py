"""Accumulated change in the base weight: every view of PEFT and torch against the same adapter kept factored.

The factored twin is loaded from the file that the merged model saves. Saved tensors and base weights are compared
exactly, outputs to the rounding of one weight.
"""

import copy
import io

import pytest
import torch
from helpers_models import TransposedLinears, tiny_gpt2, tiny_llama, tokens
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from peft.helpers import rescale_adapter_scale
from peft.utils.hotswap import hotswap_adapter
from torch import nn
from torch.nn.utils import parametrize

from peft_scalora import ScaLoRAConfig, effective_rank, export_lora, export_merged
from peft_scalora.layer import ScaLoRALayer

IDS = tokens()
CLOSE = {"rtol": 0, "atol": 2e-4}


def config(**fields) -> ScaLoRAConfig:
    settings = dict(r=2, lora_alpha=3, target_modules="all-linear", scaling_interval=1, accumulator_rank=8)
    settings |= dict(scaling="column")  # of small factors too
    return ScaLoRAConfig(**settings | fields)


def adapted(build=tiny_llama, **fields) -> nn.Module:
    torch.manual_seed(3)
    base = build()
    torch.manual_seed(4)
    return get_peft_model(base, config(**fields))


def train(model: nn.Module, steps: int = 9, lr: float = 1e-2, inputs=IDS) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        loss_of(model, inputs).backward()
        optimizer.step()
        optimizer.zero_grad()


def loss_of(model: nn.Module, inputs=IDS) -> torch.Tensor:
    return output(model, inputs).square().mean()


def output(model: nn.Module, inputs=IDS, **kwargs) -> torch.Tensor:
    result = model(inputs, **kwargs)
    return getattr(result, "logits", result)


def layers(model: nn.Module) -> list[ScaLoRALayer]:
    return [module for module in model.modules() if isinstance(module, ScaLoRALayer)]


def are_merged(model: nn.Module) -> list[bool]:
    return [layer.merged_base is not None for layer in layers(model)]


@pytest.fixture
def merged():
    model = adapted()
    train(model)
    assert all(are_merged(model))
    return model


@pytest.fixture
def factored(merged, tmp_path):
    """The same adapter without merging; saving takes the change out of the merged model, which is then put back."""
    copied = copy.deepcopy(merged)
    copied.save_pretrained(tmp_path / "adapter")
    torch.manual_seed(3)
    twin = PeftModel.from_pretrained(
        tiny_llama(), tmp_path / "adapter", is_trainable=True, config=config(accumulator="factored")
    )
    merge_again(merged)
    return twin


def merge_again(model: nn.Module) -> None:
    """Merge without a rescaling, as the next one would."""
    for layer in layers(model):
        layer.merge_into_base("default", *layer.accumulator("default").in_use())


def base_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if "base_layer.weight" in name}


def test_the_weight_holds_the_change_and_the_function_is_the_factored_ones(merged, factored):
    layer, twin = layers(merged)[0], layers(factored)[0]
    U, V = layer.accumulator("default").in_use()
    columns = layer.merged_base.columns
    expected = twin.base_layer.weight.double() + U[:, :columns].double() @ V[:columns].double()
    torch.testing.assert_close(layer.base_layer.weight.double(), expected, rtol=0, atol=1e-6)
    assert U[:, :columns].norm() > 0.01 * twin.base_layer.weight.norm()
    assert layer.accumulator("default").beside_base()[0].shape[1] == U.shape[1] - columns
    torch.testing.assert_close(output(merged), output(factored), **CLOSE)


def test_training_curves_are_the_factored_ones():
    change = {}
    for accumulator in ("merged", "factored"):
        model = adapted(accumulator=accumulator, scaling_interval=5)
        train(model, 200, lr=1e-3)
        change[accumulator] = torch.cat([layer.get_delta_weight("default").flatten() for layer in layers(model)])
    assert change["factored"].norm() > 0.1
    assert (change["merged"] - change["factored"]).norm() < 1e-5 * change["factored"].norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_base_comes_back_bit_for_bit(dtype):
    model = adapted().to(dtype)
    before = {name: tensor.clone() for name, tensor in base_weights(model).items()}
    for layer in layers(model):
        layer.merge_into_base("default", torch.randn(layer.accumulator("default").shape[0], 3),
                              torch.randn(3, layer.accumulator("default").shape[1]))  # fmt: skip
        assert not torch.equal(layer.base_layer.weight, layer.merged_base.pristine)
    after = base_weights(model)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert not any(are_merged(model))


def test_half_precision_is_rounded_once():
    model = adapted().to(torch.bfloat16)
    layer = layers(model)[0]
    M, N = layer.accumulator("default").shape
    U, V = torch.randn(M, 3), torch.randn(3, N)
    pristine = layer.base_layer.weight.detach().double()
    layer.merge_into_base("default", U, V)
    exact = pristine + U.double() @ V.double()
    assert torch.equal(layer.base_layer.weight.detach(), exact.bfloat16()) or torch.allclose(
        layer.base_layer.weight.detach().double(), exact, rtol=2**-8
    )
    for _ in range(50):  # nothing is added on top of an earlier sum
        layer.merge_into_base("default", U, V)
    assert torch.allclose(layer.base_layer.weight.detach().double(), exact, rtol=2**-8)


# Views that take the change out of the weight, each on the merged model and on its twin.


def through_state_dict(model):
    return dict(model.state_dict())


def through_adapter_state_dict(model):
    return get_peft_model_state_dict(model)


def through_unload(model):
    return dict(model.unload().state_dict())


def through_merge_and_unload(model):
    return dict(model.merge_and_unload().state_dict())


def through_merging_and_unmerging(model):
    model.merge_adapter()
    model.unmerge_adapter()
    return {"output": output(model)}


def through_merged_forward(model):
    model.merge_adapter()
    return {"output": output(model)}


def through_deepcopy(model):
    twin = copy.deepcopy(model)
    return {**twin.state_dict(), "output": output(twin), "own": output(model)}


def through_pickle(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    twin = torch.load(file, weights_only=False)
    return {**twin.state_dict(), "output": output(twin), "own": output(model)}


def through_a_cast(model):
    return dict(model.to(torch.float64).state_dict())


def through_loading(model):
    state = {
        name: 2 * t if t.is_floating_point() and "base_layer" in name else t for name, t in model.state_dict().items()
    }
    merge_if_it_can(model)
    model.load_state_dict(state)
    return {**model.state_dict(), "output": output(model)}


def merge_if_it_can(model):
    if layers(model)[0].scalora_config["default"].accumulator != "factored":
        merge_again(model)


def through_peft_helpers(model):
    layer = layers(model)[1]
    weight = layer.weight.clone()
    return {"weight": weight, "base": layer.get_base_layer().weight.clone(), "delta": layer.get_delta_weight("default")}


def through_deleting(model):
    model.add_adapter("other", config())
    model.set_adapter("other")
    model.delete_adapter("default")
    return dict(base_weights(model))


def through_weighted_adapters(model):
    model.add_weighted_adapter(["default"], [0.5], "weighted", combination_type="svd", svd_rank=4)
    model.set_adapter("weighted")
    return {"output": output(model)}


def through_ranks(model):
    return {"ranks": torch.tensor(list(effective_rank(model).values()))}


TAKING_OUT = [value for name, value in list(globals().items()) if name.startswith("through_")]


@pytest.mark.parametrize("view", TAKING_OUT, ids=lambda view: view.__name__)
def test_views_see_the_pristine_base_and_the_whole_change(view, merged, factored):
    found, expected = view(merged), view(factored)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if name in ("output", "own"):
            torch.testing.assert_close(found[name], tensor, **CLOSE)
        else:
            assert torch.equal(found[name], tensor), name


# Forward passes of others, after which the weight holds the change as before.


def disabled(model):
    with model.disable_adapter():
        return output(model)


def add_other(model):
    torch.manual_seed(5)
    model.add_adapter("other", config(init_lora_weights=False))
    merge_if_it_can(model)


def of_another_adapter(model):
    add_other(model)
    model.set_adapter("other")
    result = output(model)
    model.set_adapter("default")
    return result


def of_two_adapters(model):
    add_other(model)
    model.base_model.set_adapter(["default", "other"])
    result = output(model)
    model.set_adapter("default")
    return result


def of_mixed_batches(model):
    model.eval()
    return output(model, adapter_names=["__base__", "default"] * (len(IDS) // 2) + ["default"] * (len(IDS) % 2))


def at_another_scale(model):
    with rescale_adapter_scale(model, 0.5):
        return output(model)


@pytest.mark.parametrize("view", [disabled, of_another_adapter, of_two_adapters, of_mixed_batches, at_another_scale])
def test_forward_passes_of_others_see_the_pristine_base(view, merged, factored):
    before = output(merged)
    torch.testing.assert_close(view(merged), view(factored), **CLOSE)
    assert all(are_merged(merged))
    torch.testing.assert_close(output(merged), before, **CLOSE)


def test_the_base_model_is_the_base_model(merged):
    torch.manual_seed(3)
    base = tiny_llama()
    assert torch.equal(disabled(merged), base(IDS).logits)


def test_a_reference_pass_between_forward_and_backward_leaves_the_gradients_right(merged, factored):
    """As DPO does: the base as its own reference, with the graph of the policy still to be used."""
    gradients = []
    for model in (merged, factored):
        policy = output(model)
        with torch.no_grad():
            reference = disabled(model)
        (policy - reference).square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == 2 * len(layers(merged))
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_layers_that_others_look_at_stay_factored_until_nobody_does(merged):
    disabled(merged)
    train(merged, 1)
    assert not any(are_merged(merged))
    train(merged, 2)
    assert all(are_merged(merged))


# Saving, exporting, going on.


def test_saved_loaded_and_saved_again_is_the_same_file(merged, tmp_path):
    merged.save_pretrained(tmp_path / "first")
    torch.manual_seed(3)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "first")
    loaded.save_pretrained(tmp_path / "second")
    name = "adapter_model.safetensors"
    assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_exports_are_those_of_the_factored_form(merged, factored, tmp_path):
    for name, model in (("merged", merged), ("factored", factored)):
        export_lora(model, str(tmp_path / name))
        export_merged(model, str(tmp_path / f"{name}-model"))
    for suffix in ("/adapter_model.safetensors", "-model/model.safetensors"):
        files = [(tmp_path / f"{name}{suffix}").read_bytes() for name in ("merged", "factored")]
        assert files[0] == files[1]


def test_a_hotswapped_adapter_is_the_one_in_the_file(merged, tmp_path):
    other = adapted()
    train(other, 5, lr=3e-2)
    other.save_pretrained(tmp_path / "other")
    hotswap_adapter(merged, str(tmp_path / "other"), "default", torch_device="cpu")
    torch.testing.assert_close(output(merged), output(other), **CLOSE)


def test_stopped_and_resumed_is_the_straight_run(tmp_path):
    straight = adapted()
    optimizer = torch.optim.AdamW([p for p in straight.parameters() if p.requires_grad], lr=1e-2)

    def steps(model, optimizer, count):
        for _ in range(count):
            loss_of(model).backward()
            optimizer.step()
            optimizer.zero_grad()

    steps(straight, optimizer, 7)
    torch.save({"model": straight.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint")
    steps(straight, optimizer, 6)
    resumed = adapted()
    optimizer = torch.optim.AdamW([p for p in resumed.parameters() if p.requires_grad], lr=1e-2)
    saved = torch.load(tmp_path / "checkpoint")
    resumed.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    steps(resumed, optimizer, 6)
    assert are_merged(straight) == are_merged(resumed)
    for (name, found), expected in zip(resumed.state_dict().items(), straight.state_dict().values(), strict=True):
        assert torch.equal(found, expected), name


# Where a weight cannot hold change.


def tied():
    return tiny_llama(tie_word_embeddings=True)


def with_a_parametrization():
    model = TransposedLinears()
    model.lin0 = parametrize.register_parametrization(nn.Linear(14, 18), "weight", nn.Identity())
    return model


def with_a_hook():
    model = TransposedLinears()
    model.lin0 = nn.Linear(14, 18)
    model.lin0.register_forward_hook(lambda module, args, result: result)
    return model


def with_a_shared_module():
    model = TransposedLinears()
    model.also = nn.Sequential(model.lin0)
    return model


@pytest.mark.parametrize("build", [with_a_parametrization, with_a_hook, with_a_shared_module])
def test_weights_that_cannot_hold_change_stay_as_they_are(build):
    model = adapted(build, target_modules=["lin0", "lin1"])
    before = copy.deepcopy(model.get_base_model())
    train(model, inputs=torch.randn(6, 14))
    by_name = dict(model.get_base_model().named_modules())
    assert by_name["lin1"].merged_base is not None
    assert by_name["lin0"].merged_base is None
    assert by_name["lin0"].accumulator("default").columns > 0
    assert torch.equal(by_name["lin0"].base_layer.weight, before.get_submodule("lin0").base_layer.weight)


def test_merging_that_was_asked_for_and_cannot_be_is_said():
    model = adapted(with_a_hook, target_modules=["lin0", "lin1"], accumulator="merged")
    with pytest.warns(UserWarning, match=r"accumulator='merged': some base weights cannot hold"):
        train(model, inputs=torch.randn(6, 14))


def test_tied_embeddings_keep_their_weight():
    model = adapted(tied, target_modules=["lm_head", "q_proj"])
    embeddings = model.get_base_model().model.embed_tokens.weight.clone()
    train(model)
    assert torch.equal(model.get_base_model().model.embed_tokens.weight, embeddings)
    assert model.get_base_model().model.layers[0].self_attn.q_proj.merged_base is not None


def test_a_trained_base_weight_keeps_its_training(merged):
    """Unfreezing the base in the midst of a training must not lose what is learned into it."""
    layer = layers(merged)[0]
    with torch.no_grad():
        layer.base_layer.weight.add_(1.0)
    with pytest.raises(RuntimeError, match=r"accumulator='factored'"):
        merged.state_dict()


@pytest.mark.parametrize("build", [tiny_gpt2, TransposedLinears])
def test_transposed_weights(build):
    inputs = IDS if build is tiny_gpt2 else torch.randn(6, 14)
    targets = "all-linear" if build is tiny_gpt2 else ["lin0", "lin1"]
    models = [adapted(build, target_modules=targets, accumulator=kind) for kind in ("merged", "factored")]
    for model in models:
        train(model.eval(), 8, lr=1e-3, inputs=inputs)
    assert any(are_merged(models[0])) and not any(are_merged(models[1]))
    torch.testing.assert_close(output(models[0], inputs), output(models[1], inputs), **CLOSE)
