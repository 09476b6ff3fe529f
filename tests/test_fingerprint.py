"""Fingerprints of base models, and loading an adapter onto another base than it was trained on."""

import copy
import hashlib
import json
import warnings

import pytest
import torch
from helpers_adapters import save
from helpers_models import KINDS, every_layer_kind, fill, floats, scalora_config, tiny_llama, tokens, train
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, DistilBertConfig

from peft_scalora.files.fingerprint import check, difference, fingerprint, short

OTHER = "trained on base model"


def warned(load, match=OTHER):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load()
    return [str(warning.message) for warning in caught if match in str(warning.message)]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A base model, saved, and an adapter trained on it."""
    folder = tmp_path_factory.mktemp("fingerprint")
    torch.manual_seed(0)
    tiny_llama().save_pretrained(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    save(fill(get_peft_model(base, scalora_config(target_modules="all-linear")), inputs=tokens()), folder / "adapter")
    return folder


def load_base(folder, **kwargs):
    return AutoModelForCausalLM.from_pretrained(folder / "base", **kwargs)


@every_layer_kind
@pytest.mark.parametrize("modules_to_save", [None, ["lin1", "head", "lm_head", "classifier"]])
def test_adapters_do_not_change_it(kind, modules_to_save):
    base = kind.build()
    expected = fingerprint(base)
    targets = [target for target in kind.targets if target not in (modules_to_save or ())]
    model = get_peft_model(base, kind.config(target_modules=targets, modules_to_save=modules_to_save))
    model.add_adapter("other", kind.config(target_modules=targets, modules_to_save=modules_to_save))
    assert fingerprint(model) == fingerprint(model.get_base_model()) == expected


def test_it_is_of_names_shapes_and_values():
    """By hand, of a model of two weights."""
    model = nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.LayerNorm(4)})
    with torch.no_grad():
        model["a"].weight.copy_(torch.arange(6.0).view(2, 3))
        model["b"].weight.copy_(torch.tensor([5.0, 6, 7, 8]))
    found = fingerprint(model)
    assert sorted(found["values"]) == [2.0, 4.0, 6.0, 7.0]  # entries 6 // 3 and 12 // 3, and 4 // 3 and 8 // 3
    assert json.loads(json.dumps(found)) == found
    renamed = nn.ModuleDict({"c": model["a"], "b": model["b"]})
    assert fingerprint(renamed)["weights"] != found["weights"]
    model["a"].bias.data += 1
    assert fingerprint(model) == found, "biases may be trained beside the adapter"


def test_a_base_moved_by_a_hundredth_is_another_and_one_rounded_to_bfloat16_is_not():
    """The tolerance of 2^-7 lies between: bfloat16 rounds by up to 2^-8, at worst at the tie 1 + 2^-8."""
    base = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    for layer in base:
        nn.init.constant_(layer.weight, 1 + 2**-8)
    recorded = fingerprint(base)
    rounded = fingerprint(copy.deepcopy(base).bfloat16())
    assert rounded["values"] == [1.0] * 4
    assert difference(recorded, rounded) is None
    for factor in (0.99, 1.01):
        moved = copy.deepcopy(base)
        for layer in moved:
            layer.weight.data *= factor
        assert difference(recorded, fingerprint(moved)) == "4 of 4 sampled weights have another value"


def test_modules_to_save_have_no_values():
    """The same names, shapes and places, so that fingerprints with and without them compare."""
    model = nn.ModuleDict(
        {"a": nn.Linear(3, 2), "pre_b": nn.ModuleDict({"inner": nn.Linear(2, 2)}), "c": nn.Linear(2, 2)}
    )
    whole, part = fingerprint(model), fingerprint(model, ["b"])
    assert part["weights"] == whole["weights"] and part["values"].count(None) == 2
    with torch.no_grad():
        model["pre_b"]["inner"].weight.add_(1)
    assert fingerprint(model, ["b"]) == part
    assert difference(whole, fingerprint(model)) is not None
    assert difference(whole, fingerprint(model, ["b"])) is difference(part, fingerprint(model)) is None
    with torch.no_grad():
        model["c"].weight.add_(1)
    assert difference(part, fingerprint(model, ["b"])) == "2 of 4 sampled weights have another value"


def test_it_reads_few_values_of_a_large_model():
    wide = nn.Sequential(*(nn.Linear(4, 4) for _ in range(100)))
    assert len(fingerprint(wide)["values"]) == 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_the_same_base_in_any_precision_is_the_same(adapter, dtype, low_cpu_mem_usage):
    base = load_base(adapter, dtype=dtype)
    assert not warned(lambda: PeftModel.from_pretrained(base, adapter / "adapter", low_cpu_mem_usage=low_cpu_mem_usage))


def test_another_base_is_named(adapter):
    """One of other weights, of another shape, and the same one after some training."""
    torch.manual_seed(1)
    trained = load_base(adapter)
    with torch.no_grad():
        for weight in trained.parameters():
            weight.add_(0.05 * weight.std() * torch.randn_like(weight))
    for other, reason in (
        (tiny_llama(), "sampled weights have another value"),
        (trained, "sampled weights have another value"),
        (tiny_llama(vocab_size=41), "names or shapes"),
        (tiny_llama(num_hidden_layers=3), "names or shapes"),
    ):
        current = short(fingerprint(other))
        (message,) = warned(lambda base=other: PeftModel.from_pretrained(base, adapter / "adapter"))
        recorded = json.loads((adapter / "adapter" / "adapter_config.json").read_text())["base_fingerprint"]
        assert str(adapter / "base") in message
        for part in (short(recorded), current, reason, "load it onto the model it was trained on"):
            assert part in message
        assert short(recorded) != current


def test_another_base_is_named_for_a_second_adapter(adapter):
    torch.manual_seed(1)
    model = get_peft_model(tiny_llama(), scalora_config(target_modules=["q_proj"]))
    assert warned(lambda: model.load_adapter(adapter / "adapter", "second"))


def test_saving_again_records_the_base_that_is_there(adapter, tmp_path):
    torch.manual_seed(1)
    base = tiny_llama()
    expected = fingerprint(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save(PeftModel.from_pretrained(base, adapter / "adapter"), tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_fingerprint"] == expected


def test_one_configuration_serves_for_two_models(tmp_path):
    """And the fingerprint is that of the base as it was before training, whole."""
    config = scalora_config(target_modules=["lin0"])
    for name in ("first", "second"):
        base = KINDS["Linear"].build()
        expected = fingerprint(base)
        model = get_peft_model(base, config)
        base.lin1.weight.data.zero_()
        assert not warned(lambda model=model, name=name: save(model, tmp_path / name))
        assert json.loads((tmp_path / name / "adapter_config.json").read_text())["base_fingerprint"] == expected


def test_adapters_that_transformers_carries(adapter, tmp_path):
    base = load_base(adapter)
    expected = fingerprint(base)
    base.add_adapter(scalora_config(target_modules=["q_proj"]))
    base.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_fingerprint"] == expected


def test_change_in_the_weights_of_a_base_in_training_is_none_of_its_fingerprint(adapter):
    """A state dict that the caller made leaves the weights as training has them."""
    base = load_base(adapter)
    expected = fingerprint(base)
    base.add_adapter(scalora_config(target_modules="all-linear"))
    train(base, tokens(), 6)
    state = {name: p for name, p in base.named_parameters() if "lora_" in name}
    get_peft_model_state_dict(base, state_dict=state)
    assert base.peft_config["default"].base_fingerprint == expected


def test_weights_that_are_not_in_memory_have_no_values(adapter):
    base = load_base(adapter)
    with torch.device("meta"):
        empty = tiny_llama()
    assert fingerprint(empty)["weights"] == fingerprint(base)["weights"]
    assert set(fingerprint(empty)["values"]) == {None}
    assert difference(fingerprint(base), fingerprint(empty)) is None
    assert not warned(lambda: PeftModel.from_pretrained(copy.deepcopy(empty), adapter / "adapter"))


def test_plain_lora_is_left_alone(adapter, tmp_path):
    get_peft_model(load_base(adapter), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    assert not warned(lambda: PeftModel.from_pretrained(tiny_llama(), tmp_path))


class Renamed(nn.Module):
    """A model whose modules have other names than those of KINDS["Linear"], as after a release that renamed them."""

    def __init__(self, base):
        super().__init__()
        self.encoder = nn.Module()
        self.encoder.first, self.encoder.second = base.lin0, base.lin1

    def forward(self, x):
        return self.encoder.second(torch.tanh(self.encoder.first(x)))


RENAMED = {r"^lin0": "encoder.first", r"^lin1": "encoder.second"}


def load_renamed(base, folder):
    """Load an adapter of KINDS["Linear"] onto a model with other names."""
    config = scalora_config(target_modules=["first", "second"])
    config.base_fingerprint = json.loads((folder / "adapter_config.json").read_text())["base_fingerprint"]
    return PeftModel.from_pretrained(Renamed(base), folder, config=config, key_mapping=RENAMED)


def test_a_base_whose_weights_were_renamed_is_the_same(tmp_path):
    base, model = KINDS["Linear"].filled()
    save(model, tmp_path)
    loaded = []
    assert not warned(lambda: loaded.append(load_renamed(copy.deepcopy(base), tmp_path)))
    x = floats(5, 14)
    torch.testing.assert_close(loaded[0](x), model(x), rtol=1e-5, atol=1e-5)


def test_another_base_whose_weights_were_renamed_is_named(tmp_path):
    base, model = KINDS["Linear"].filled()
    save(model, tmp_path)
    other = copy.deepcopy(base)
    with torch.no_grad():
        other.lin0.weight.mul_(1.1)
        other.lin1.weight.mul_(1.1)
    (message,) = warned(lambda: load_renamed(other, tmp_path))
    assert "4 of 4 sampled weights have another value" in message


def test_fingerprints_of_older_releases_still_compare():
    """Those have names, shapes and values, but none by place."""
    base = KINDS["Linear"].build()
    now = fingerprint(base)
    before = {name: now[name] for name in ("weights", "values")}
    check(before)
    assert difference(before, now) is None
    assert difference(before, fingerprint(Renamed(copy.deepcopy(base)))) == "its weights have other names or shapes"
    with torch.no_grad():
        base.lin0.weight.mul_(1.1)
    assert difference(before, fingerprint(base)) == "2 of 4 sampled weights have another value"


def test_the_hash_of_names_is_that_of_older_releases():
    """Adapters have recorded it."""
    model = nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.LayerNorm(4)})
    names = [["a.weight", [2, 3]], ["b.weight", [4]]]
    assert fingerprint(model)["weights"] == hashlib.sha256(json.dumps(names).encode()).hexdigest()[:16]


@pytest.mark.parametrize("value", ["x", 3, [], {}, {"weights": 1, "values": []}, {"weights": "a", "values": ["b"]}])
def test_what_is_no_fingerprint_is_refused(value):
    with pytest.raises(ValueError, match=r"base_fingerprint=.* is not a fingerprint \(expected .*Remove the field"):
        check(value)
    with pytest.raises(ValueError, match="base_fingerprint="):
        scalora_config(base_fingerprint=value)


def test_a_fresh_classification_head_does_not_make_another_base(tmp_path):
    """It is random in every load, and part of the adapter."""
    import warnings

    from helpers_runs import save_classifier
    from peft import PeftModel, get_peft_model

    from peft_scalora import ScaLoRAConfig

    headless = str(tmp_path / "base")
    AutoModel.from_pretrained(save_classifier(tmp_path / "classifier")).save_pretrained(headless)
    first, second = (AutoModelForSequenceClassification.from_pretrained(headless, num_labels=2) for _ in range(2))
    assert not first.classifier.weight.equal(second.classifier.weight)
    config = ScaLoRAConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS")
    get_peft_model(first, config).save_pretrained(tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*fingerprint.*")
        PeftModel.from_pretrained(second, tmp_path / "adapter")


@pytest.mark.parametrize("recorded_before", [False, True])
def test_fresh_modules_that_are_trained_whole_do_not_make_another_base(tmp_path, recorded_before):
    """Those are random in every load, and part of the adapter; fingerprints once held their values."""
    config = DistilBertConfig(vocab_size=20, dim=16, hidden_dim=32, n_layers=1, n_heads=2)
    AutoModel.from_config(config).save_pretrained(tmp_path / "base")

    def load():
        return AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")

    first, second = load(), load()
    assert not first.pre_classifier.weight.equal(second.pre_classifier.weight)
    config = scalora_config(target_modules=["q_lin"], modules_to_save=["pre_classifier"], task_type="SEQ_CLS")
    before = fingerprint(first)
    save(get_peft_model(first, config), tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    saved = json.loads(path.read_text())
    assert saved["base_fingerprint"]["weights"] == before["weights"]
    if recorded_before:
        path.write_text(json.dumps(saved | {"base_fingerprint": before}))
    assert difference(before, fingerprint(second))
    assert not warned(lambda: PeftModel.from_pretrained(second, tmp_path / "adapter"))
    other = load()
    with torch.no_grad():
        other.distilbert.embeddings.word_embeddings.weight.add_(1)
    assert warned(lambda: PeftModel.from_pretrained(other, tmp_path / "adapter"))
