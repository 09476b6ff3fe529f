"""Quantized base models, loaded as users load them: training, saving, merging and exporting.

The base weights are compared by their stored bits; merged weights with NumPy sums of what the quantizer itself says.
"""

import copy
import json
import runpy
import warnings
from pathlib import Path

import pytest
import torch
from helpers_adapters import save
from helpers_models import change_of, distance, saved_tensors, scalora_layers
from helpers_runs import language_model, save_tokenizer
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from peft_scalora import ScaLoRAConfig, effective_rank, export_lora, export_merged
from peft_scalora.files.fingerprint import difference, fingerprint

R, STEPS = 2, 50
EXAMPLES = Path(__file__).parents[1] / "examples"


def four_bit(quant_type, double):
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float32,
    )


def torchao_int8():
    quantization = pytest.importorskip("torchao.quantization")
    return TorchAoConfig(quantization.Int8WeightOnlyConfig())


SCHEMES = {
    "nf4": lambda: four_bit("nf4", False),
    "nf4 double": lambda: four_bit("nf4", True),
    "fp4": lambda: four_bit("fp4", False),
    "int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "torchao int8": torchao_int8,
}
every_scheme = pytest.mark.parametrize("scheme", SCHEMES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """In widths that bitsandbytes has fast paths for, which it does not take for others."""
    folder = tmp_path_factory.mktemp("quantized") / "base"
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    language_model(**sizes).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def load_base(folder, scheme):
    base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=SCHEMES[scheme](), dtype=torch.float32)
    return prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)


def tokens(step):
    return torch.randint(5, 17, (4, 8), generator=torch.Generator().manual_seed(step))


def train(model, steps=STEPS, optimizer=None, evaluate=False):
    optimizer = optimizer or torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(steps):
        model.train()
        model(input_ids=tokens(step), labels=tokens(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if evaluate and step % 10 == 0:
            logits(model)
    return model


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=tokens(0)).logits


def stored_bits(model):
    """Every stored tensor of the base model: codes, scales and what is not quantized."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        if "lora_" in name or not isinstance(tensor, torch.Tensor):
            continue
        parts = {"": tensor}
        if hasattr(tensor, "__tensor_flatten__"):  # torchao's
            parts = {part: getattr(tensor, part) for part in tensor.__tensor_flatten__()[0]}
        tensors |= {f"{name}.{part}": part_tensor.clone() for part, part_tensor in parts.items()}
    return tensors


_trained = {}


@pytest.fixture
def trained(folder, scheme):
    """An adapter of 50 steps, with evaluations in between, and the base's bits before them; trained once a scheme."""
    if scheme not in _trained:
        torch.manual_seed(0)
        config = ScaLoRAConfig(
            r=R, target_modules="all-linear", scaling="column", scaling_interval=5, task_type="CAUSAL_LM"
        )
        model = get_peft_model(load_base(folder, scheme), config)
        bits = stored_bits(model)
        _trained[scheme] = train(model, evaluate=True), bits
    return _trained[scheme]


@every_scheme
def test_training_raises_the_rank_and_leaves_every_bit_of_the_base(trained, scheme):
    model, before = trained
    after = stored_bits(model)
    assert before.keys() == after.keys() and len(before) > 20
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
    assert any(not tensor.is_floating_point() for tensor in before.values()), "the weights have to be quantized"
    ranks = effective_rank(model)
    assert len(ranks) == 14 and min(ranks.values()) > R
    assert sorted(ranks.values())[len(ranks) // 2] > 2 * R
    layer = next(iter(scalora_layers(model).values()))
    assert layer.progress("default").rescalings == STEPS // 5


@every_scheme
def test_saving_and_loading_is_exact(trained, folder, scheme, tmp_path):
    model, _ = trained
    save(model, tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The adapter was trained on base model")
        loaded = PeftModel.from_pretrained(load_base(folder, scheme), tmp_path, is_trainable=True)
    assert torch.equal(logits(loaded), logits(model))
    resumed, straight = train(loaded, 5), train(copy.deepcopy(model), 5)
    assert torch.equal(logits(resumed), logits(straight))
    assert not torch.equal(logits(resumed), logits(model))


@every_scheme
def test_layers_compute_the_dense_change(trained, scheme):
    model, _ = trained
    for name, tensors in saved_tensors(model).items():
        layer = model.base_model.model.get_submodule(name)
        x = torch.randn(3, layer.in_features)
        change = change_of(tensors, layer.scaling["default"])
        assert distance(layer(x), layer.base_layer(x).double() + x.double() @ change.T) < 1e-5


def values_of(layer):
    """The quantized weight of a layer, read off the layer itself: what it makes of unit vectors."""
    layer = getattr(layer, "base_layer", layer)
    unit = torch.eye(layer.in_features)
    bias = 0 if layer.bias is None else layer.bias.detach()
    return (layer(unit.requires_grad_()).detach() - bias).T.double()


@every_scheme
def test_merging_reports_what_quantizing_again_costs(trained, scheme):
    """The figure in the warning, from weights read before and after."""
    model = copy.deepcopy(trained[0])
    layers = {name: model.base_model.model.get_submodule(name) for name in saved_tensors(model)}
    before = {name: values_of(layer) for name, layer in layers.items()}
    changes = {name: change_of(t, layers[name].scaling["default"]) for name, t in saved_tensors(model).items()}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        merged = model.merge_and_unload()
    (message,) = [str(w.message) for w in caught if "Merging quantized" in str(w.message)]
    error2 = sum((values_of(merged.get_submodule(n)) - before[n] - changes[n]).norm() ** 2 for n in changes)
    cost = float(error2 / sum(change.norm() ** 2 for change in changes.values())) ** 0.5
    told = float(message.split(" by ")[1].split(" times")[0])
    assert "Merging quantized 14 weights" in message and "export_merged" in message
    # 8-bit products round their inputs too, which is part of what unit vectors see.
    assert told == pytest.approx(cost, rel=0.1 if scheme != "int8" else 0.5)


@every_scheme
def test_merging_in_place_reports_too_and_can_be_undone(trained, scheme):
    model = copy.deepcopy(trained[0])
    with pytest.warns(UserWarning, match="Merging quantized 14 weights"):
        model.merge_adapter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.unmerge_adapter()
    assert distance(logits(model), logits(trained[0])) < 0.5


@every_scheme
def test_merged_export_is_not_quantized_again(trained, folder, scheme, tmp_path):
    model, _ = trained
    report = export_merged(model, tmp_path / "merged")
    assert report.relative_error < 1e-5 and report.dtype == torch.float32
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert getattr(loaded.config, "quantization_config", None) is None
    # Linear8bitLt rounds its inputs to 8 bit as well, which an unquantized weight does not.
    assert distance(logits(loaded), logits(model)) < (0.05 if scheme == "int8" else 1e-4)
    for name, tensors in saved_tensors(model).items():
        layer = model.base_model.model.get_submodule(name)
        exact = values_of(layer) + change_of(tensors, layer.scaling["default"])
        assert distance(loaded.get_submodule(name).weight, exact) < (0.02 if scheme == "int8" else 1e-5)


@every_scheme
def test_plain_lora_export_serves_on_the_same_base(trained, folder, scheme, tmp_path):
    model, _ = trained
    export_lora(model, tmp_path / "plain")
    plain = PeftModel.from_pretrained(load_base(folder, scheme), tmp_path / "plain")
    with torch.no_grad():  # in evaluation on a CPU bitsandbytes would go over to bfloat16
        served = plain.train()(input_ids=tokens(0)).logits
    assert distance(served, logits(model)) < (1e-2 if scheme == "int8" else 1e-4)


@every_scheme
def test_fingerprint_is_that_of_the_unquantized_model(folder, scheme):
    plain, quantized = AutoModelForCausalLM.from_pretrained(folder), load_base(folder, scheme)
    assert fingerprint(quantized)["weights"] == fingerprint(plain)["weights"]
    assert difference(fingerprint(quantized), fingerprint(plain)) is None
    values = fingerprint(quantized)["values"]
    assert None in values and any(value is not None for value in values)
    plain.model.embed_tokens.weight.data *= 2
    assert difference(fingerprint(quantized), fingerprint(plain)) is not None


def test_a_base_that_was_evaluated_before_is_not_merged_wrongly(folder):
    """In evaluation bitsandbytes packs 4-bit weights and rounds their scales, on CPUs with the instructions for it."""
    base = load_base(folder, "nf4")
    if not base.model.layers[0].mlp.up_proj.support_avx512bf16_for_cpu:
        pytest.skip("this CPU has no instructions that bitsandbytes packs for")
    logits(base)
    model = get_peft_model(base, ScaLoRAConfig(target_modules=["up_proj"], init_lora_weights=False))
    with pytest.raises(ValueError, match=r"evaluated on a CPU before.*Load the base model again"):
        model.merge_adapter()


def test_torchao_int4_is_refused_by_name(folder):
    quantization = pytest.importorskip("torchao.quantization")
    base = language_model()
    weight = torch.zeros(4, 2, dtype=torch.int8), torch.ones(1, 4), torch.zeros(1, 4)
    int4 = quantization.Int4Tensor(*weight, block_size=[1, 4], shape=torch.Size([4, 4]))
    base.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(int4, requires_grad=False)
    with pytest.raises(TypeError, match="only supports int8"):
        get_peft_model(base, ScaLoRAConfig(target_modules=["up_proj"]))


@pytest.mark.parametrize("bits", ["4", "8"])
def test_example(folder, bits, tmp_path, monkeypatch, capsys):
    """The script that users copy, under Trainer, on text that it makes itself."""
    monkeypatch.syspath_prepend(EXAMPLES)
    arguments = ["--model", str(folder), "--generated", "--bits", bits, "--steps", "12", "--r", "2"]
    monkeypatch.setattr(
        "sys.argv",
        ["qlora.py", *arguments, "--scaling", "column", "--scaling-interval", "2", "--output", str(tmp_path)],
    )
    runpy.run_path(str(EXAMPLES / "qlora.py"), run_name="__main__")
    figures = json.loads(capsys.readouterr().out.partition("\n{\n")[2].join(["{", ""]))
    assert figures["base unchanged"] is True
    assert figures["largest difference of a logit after saving and loading"] == 0
    assert figures["mean effective rank"] > 2
    assert figures["merged in place"].startswith("Merging quantized 14 weights")
    assert {"adapter", "plain_lora", "merged"} <= {path.name for path in tmp_path.iterdir()}
