"""Base model and adapter written as one model: against dense sums, and against what the adapted model computes."""

import copy
import json

import pytest
import torch
import transformers
from helpers_adapters import save
from helpers_models import (
    KINDS,
    distance,
    fill,
    oracle,
    output,
    scalora_config,
    scalora_layers,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    tokens,
    train,
)
from helpers_runs import language_model, save_language_model
from helpers_transformers import TIED, UNUSUAL_CLASSES, WITHOUT_EMBEDDINGS, adapted, ids, images, logits, vit
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from peft_scalora import export_merged
from peft_scalora.cli import main
from peft_scalora.export.merged import export_merged_folder

LINEAR = ["q_proj", "v_proj", "down_proj"]


def filled_llama(base=None, **options):
    base = tiny_llama() if base is None else base
    config = scalora_config(**{"target_modules": LINEAR, "task_type": "CAUSAL_LM"} | options)
    return fill(get_peft_model(base, config), inputs=tokens())


BUILDS = {
    "Llama": (tiny_llama, AutoModelForCausalLM, {"target_modules": [*LINEAR, "embed_tokens", "lm_head"]}),
    "tied, embeddings": (
        lambda: tiny_llama(tie_word_embeddings=True),
        AutoModelForCausalLM,
        {"target_modules": ["embed_tokens", "q_proj"]},
    ),
    "tied, head": (
        lambda: tiny_llama(tie_word_embeddings=True),
        AutoModelForCausalLM,
        {"target_modules": ["lm_head", "q_proj"]},
    ),
    "tied, neither": (lambda: tiny_llama(tie_word_embeddings=True), AutoModelForCausalLM, {"target_modules": LINEAR}),
    "GPT-2": (tiny_gpt2, AutoModelForCausalLM, {"target_modules": ["c_attn", "wte"], "fan_in_fan_out": True}),
    "BERT": (
        tiny_bert,
        AutoModelForSequenceClassification,
        {"target_modules": ["query"], "modules_to_save": ["classifier"], "task_type": "SEQ_CLS"},
    ),
}


@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`")
@pytest.mark.parametrize("build, auto, options", BUILDS.values(), ids=BUILDS)
def test_merged_model_computes_the_dense_sum(tmp_path, build, auto, options):
    base = build().eval()
    model = fill(get_peft_model(copy.deepcopy(base), scalora_config(**options)), inputs=tokens())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = output(model, tokens())
    report = export_merged(model, tmp_path / "merged")
    loaded = auto.from_pretrained(tmp_path / "merged").eval()
    assert distance(output(loaded, tokens()), oracle(base, model, tokens())) < 1e-5
    assert report.relative_error < 1e-6 and report.dtype == torch.float32
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(output(model, tokens()), expected)


def test_merged_model_is_rounded_once(tmp_path):
    """The error that is reported, against explicit float64 sums; twice rounding would be worse."""
    base = tiny_llama().to(torch.bfloat16)
    model = filled_llama(base)
    weights = {name: layer.get_base_layer().weight.detach().double() for name, layer in scalora_layers(model).items()}
    report = export_merged(model, tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert loaded.dtype == report.dtype == torch.bfloat16
    error2 = norm2 = 0.0
    for name, layer in scalora_layers(model).items():
        change = layer.get_delta_weight("default").detach().double()
        written = loaded.get_submodule(name.removeprefix("base_model.model.")).weight.detach().double()
        error2 += (written - weights[name] - change).norm() ** 2
        norm2 += change.norm() ** 2
        expected = (weights[name] + change).to(torch.bfloat16).double()
        assert (written == expected).double().mean() > 0.99
    assert report.relative_error == pytest.approx(float((error2 / norm2) ** 0.5), rel=1e-2)
    wide = export_merged(model, tmp_path / "wide", dtype=torch.float32)
    assert wide.relative_error < 1e-5 < report.relative_error
    card = (tmp_path / "merged" / "README.md").read_text()
    assert f"{report.relative_error:.3g}" in card and "in bfloat16" in card


def test_merged_model_of_another_adapter(tmp_path):
    model = filled_llama()
    model.add_adapter("other", scalora_config(target_modules=["k_proj"]))
    fill(model, "other", tokens(), seed=5)
    model.set_adapter("other")
    expected = output(model, tokens())
    export_merged(model, tmp_path / "merged", adapter_name="other")
    assert distance(output(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), tokens()), expected) < 1e-5


def test_merged_model_has_the_scale_that_was_set(tmp_path):
    model = filled_llama()
    for layer in scalora_layers(model).values():
        layer.set_scale("default", 0.5)
    expected = output(model, tokens())
    assert export_merged(model, tmp_path / "merged").relative_error < 1e-6
    assert distance(output(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), tokens()), expected) < 1e-5


def test_command_writes_the_merged_model_with_its_tokenizer(tmp_path, capsys):
    save_language_model(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    ids = tokens() % 12 + 5
    model = fill(get_peft_model(base, scalora_config(target_modules=LINEAR, task_type="CAUSAL_LM")), inputs=ids)
    save(model, tmp_path / "adapter")
    assert main(["export", str(tmp_path / "adapter"), str(tmp_path / "merged"), "--merged"]) == 0
    assert "merged model in float32" in capsys.readouterr().out
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert distance(output(loaded, ids), output(model, ids)) < 1e-5
    assert (tmp_path / "merged" / "tokenizer_config.json").exists()
    language_model().save_pretrained(tmp_path / "elsewhere")
    arguments = ["export", str(tmp_path / "adapter"), str(tmp_path / "again"), "--merged", "--base"]
    assert main([*arguments, str(tmp_path / "elsewhere")]) == 0
    assert not (tmp_path / "again" / "tokenizer_config.json").exists()
    assert main([*arguments, str(tmp_path / "elsewhere"), "--rank", "3"]) == 1
    capsys.readouterr()
    arguments = ["export", str(tmp_path / "adapter"), str(tmp_path / "half"), "--merged", "--dtype", "bfloat16"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "merged model in bfloat16, rounding changed" in printed and "by 0," not in printed
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half").dtype == torch.bfloat16


def test_command_merges_a_classifier_of_its_own_number_of_labels(tmp_path):
    tiny_bert().bert.save_pretrained(tmp_path / "base")  # without a head
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=5)
    model = fill(get_peft_model(base, scalora_config(target_modules=["query"], task_type="SEQ_CLS")), inputs=tokens())
    save(model, tmp_path / "adapter")
    classes = ["bad", "poor", "fair", "good", "best"]
    (tmp_path / "adapter" / "metrics.json").write_text(json.dumps({"labels": classes}))
    assert main(["export", str(tmp_path / "adapter"), str(tmp_path / "merged"), "--merged"]) == 0
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert distance(output(loaded, tokens()), output(model, tokens())) < 1e-5
    assert [loaded.config.id2label[number] for number in range(5)] == classes


def test_what_cannot_be_merged_is_refused(tmp_path):
    model = filled_llama()
    with pytest.raises(ValueError, match="adapter_name='other'"):
        export_merged(model, tmp_path / "merged", adapter_name="other")
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"\['default'\] are merged.*unmerge_adapter"):
        export_merged(model, tmp_path / "merged")
    with pytest.raises(ValueError, match=r"transformers models, not Linears.*merge_and_unload"):
        export_merged(KINDS["Linear"].filled()[1], tmp_path / "merged")
    lora = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="no ScaLoRA adapter"):
        export_merged(lora, tmp_path / "merged")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    with pytest.raises(FileExistsError, match="not an empty folder"):
        export_merged(filled_llama(), tmp_path / "full")
    assert not (tmp_path / "merged").exists()


# Architectures.


def check_loads_as(model, folder, inputs):
    """The folder is a whole model, without random weights, that computes what `model` does."""
    loaded, info = type(model.get_base_model()).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    with torch.no_grad():
        assert distance(logits(loaded, inputs), logits(model, inputs)) < 1e-4
        with model.disable_adapter():
            assert distance(logits(loaded, inputs), logits(model, inputs)) > 1e-3


ALL = UNUSUAL_CLASSES | WITHOUT_EMBEDDINGS


@pytest.mark.parametrize("architecture", ALL.values(), ids=ALL)
def test_every_architecture_is_saved_loaded_and_merged(tmp_path, architecture):
    model, inputs = architecture.adapted(tmp_path / "base"), architecture.inputs()
    save(model, tmp_path / "adapter")
    base = type(model.get_base_model()).from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        assert distance(logits(loaded, inputs), logits(model, inputs)) < 1e-6
    export_merged(model, tmp_path / "one")
    check_loads_as(model, tmp_path / "one", inputs)
    export_merged_folder(str(tmp_path / "adapter"), str(tmp_path / "two"))
    check_loads_as(model, tmp_path / "two", inputs)


@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`")
@pytest.mark.parametrize("architecture", TIED.values(), ids=TIED)
def test_modules_that_share_a_weight_get_one_of_their_own(tmp_path, architecture):
    model = architecture.adapted(tmp_path / "base")
    export_merged(model, tmp_path / "merged")
    check_loads_as(model, tmp_path / "merged", architecture.inputs())


def test_base_with_another_number_of_labels(tmp_path):
    """As when an image classifier of a thousand classes is trained on three."""
    vit(7).save_pretrained(tmp_path / "base")
    base = transformers.ViTForImageClassification.from_pretrained(
        tmp_path / "base", num_labels=3, ignore_mismatched_sizes=True
    )
    model = adapted(base, images(), **UNUSUAL_CLASSES["ViT"].options)
    save(model, tmp_path / "adapter")
    export_merged_folder(str(tmp_path / "adapter"), str(tmp_path / "merged"))
    check_loads_as(model, tmp_path / "merged", images())


def with_tokens_added(folder, tie_word_embeddings=False, **options):
    tiny_llama(tie_word_embeddings=tie_word_embeddings).save_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(folder)
    base.resize_token_embeddings(44)
    inputs = {"input_ids": torch.cat([tokens(), torch.tensor([[41], [43]] * 2)], 1)}
    return adapted(base, inputs, **{"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | options), inputs


@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`")
@pytest.mark.parametrize(
    "options",
    [
        {"trainable_token_indices": [41, 43]},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
        {},
    ],
    ids=str,
)
@pytest.mark.parametrize("tied", [False, True])
def test_base_with_tokens_added(tmp_path, tied, options):
    model, inputs = with_tokens_added(tmp_path / "base", tie_word_embeddings=tied, **options)
    save(model, tmp_path / "adapter")
    export_merged_folder(str(tmp_path / "adapter"), str(tmp_path / "merged"))
    check_loads_as(model, tmp_path / "merged", inputs)


def test_tokens_added_that_the_adapter_has_no_head_for(tmp_path):
    """PEFT saves the embeddings that are adapted, and leaves out the other ones."""
    model, _ = with_tokens_added(tmp_path / "base", target_modules=["q_proj", "embed_tokens"])
    save(model, tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"vocabulary of 44 and has no weights for \['lm_head'\]"):
        export_merged_folder(str(tmp_path / "adapter"), str(tmp_path / "merged"))


def test_random_weights_are_not_merged(tmp_path):
    """A pooler that neither the base has nor the adapter: the model was trained with another one."""
    transformers.BertForMaskedLM(tiny_bert().config).save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    save(adapted(base, ids(), target_modules=["query"], task_type="SEQ_CLS"), tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"has no weights for \['bert\.pooler.*call export_merged\(model, path\)"):
        export_merged_folder(str(tmp_path / "adapter"), str(tmp_path / "merged"))
    assert not (tmp_path / "merged").exists()


def test_adapter_of_another_model_is_not_merged(tmp_path):
    """By name its layers are found, but not all of its tensors have a place."""
    tiny_llama(num_hidden_layers=1).save_pretrained(tmp_path / "smaller")
    tiny_llama(num_hidden_layers=3).save_pretrained(tmp_path / "larger")
    model = filled_llama()
    save(model, tmp_path / "adapter")
    layer = r"\['base_model\.model\.model\.layers\."
    for base, part in (("smaller", f"the model 21 {layer}1"), ("larger", f"the adapter lacks 21 tensors {layer}2")):
        with pytest.raises(ValueError, match=part):
            export_merged_folder(str(tmp_path / "adapter"), str(tmp_path / "merged"), base=str(tmp_path / base))


def test_model_that_carries_the_adapter_itself(tmp_path):
    """Refused by name as a model, merged as a folder."""
    tiny_llama().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = copy.deepcopy(base)
    model.add_adapter(scalora_config(target_modules=LINEAR))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    train(model, tokens(), 6)
    with pytest.raises(ValueError, match=r"takes a PeftModel, not LlamaForCausalLM.*save_pretrained.*--merged"):
        export_merged(model, tmp_path / "merged")
    model.save_pretrained(tmp_path / "adapter")
    export_merged_folder(str(tmp_path / "adapter"), str(tmp_path / "merged"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert distance(output(loaded, tokens()), output(model, tokens())) < 1e-5
    assert distance(output(loaded, tokens()), output(base, tokens())) > 1e-3


def test_parametrized_layer_is_not_merged(tmp_path):
    """PEFT would add the change to a weight that is computed anew from its parts."""
    architecture = WITHOUT_EMBEDDINGS["Wav2Vec2"]
    torch.manual_seed(0)
    base = architecture.build()
    torch.nn.utils.parametrizations.weight_norm(base.wav2vec2.encoder.layers[0].attention.q_proj)
    model = get_peft_model(base, scalora_config(**architecture.options))
    with pytest.raises(ValueError, match="q_proj: the weight of its base layer is parametrized"):
        export_merged(model, tmp_path / "merged")
