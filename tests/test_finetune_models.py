"""What of a model a run adapts, what it trains whole, and that a reloaded run is the one that was evaluated."""

import copy

import pytest
import torch
from helpers_runs import classification_rows, language_model, save_classifier, save_encoder, sentences, write_rows
from peft import PeftConfig, PeftModel
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForSequenceClassification,
    DebertaV2Config,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    RobertaConfig,
)

from peft_scalora.cli import main
from peft_scalora.finetuning.run import FinetuneSettings, finetune

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
ENCODERS = {
    "bert": None,
    "deberta": DebertaV2Config(
        vocab_size=20, **SIZES, relative_attention=True, pos_att_type=["p2c", "c2p"], type_vocab_size=0
    ),
    "distilbert": DistilBertConfig(vocab_size=20, dim=16, hidden_dim=32, n_layers=1, n_heads=2),
    "roberta": RobertaConfig(vocab_size=20, **SIZES, pad_token_id=0),
}
WHOLE = {  # modules that only the classifier has
    "bert": {"classifier"},
    "deberta": {"classifier", "pooler.dense"},
    "distilbert": {"classifier", "pre_classifier"},
    "roberta": {"classifier"},
}


def settings(tmp_path, model, **overrides):
    defaults = dict(
        model=model,
        data=write_rows(tmp_path / "rows.jsonl", classification_rows(60)),
        eval_data=write_rows(tmp_path / "eval.jsonl", classification_rows(40)),
        task="classification",
        output=str(tmp_path / "run"),
        r=2,
        learning_rate=1e-2,
        max_steps=8,
        scaling_interval=3,
    )
    return FinetuneSettings(**defaults | overrides)


def reloaded(folder, run, seed):
    """The saved run, onto a base model whose fresh modules are drawn anew."""
    torch.manual_seed(seed)
    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    return PeftModel.from_pretrained(base, run).eval()


@torch.no_grad()
def loss_of(model, folder):
    rows = classification_rows(40)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer([row["sentence"] for row in rows], padding=True, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    return float(cross_entropy(model(**inputs).logits, torch.tensor([row["label"] for row in rows])))


def adapted(model):
    return {name.split(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A." in name}


@pytest.mark.parametrize("method", ["scalora", "lora"])
@pytest.mark.parametrize("name", list(ENCODERS))
def test_a_reloaded_run_is_the_one_that_was_evaluated(tmp_path, name, method):
    folder = save_encoder(tmp_path / "model", ENCODERS[name])
    metrics = finetune(settings(tmp_path, folder, method=method))
    models = [reloaded(folder, tmp_path / "run", seed) for seed in (1, 2)]
    for model in models:
        assert loss_of(model, folder) == pytest.approx(metrics["eval_loss"], rel=1e-5)
        wrapped = {m.removeprefix("base_model.model.") for m, module in model.named_modules() if is_whole(module)}
        assert wrapped == WHOLE[name]
        assert not any(whole in layer for layer in adapted(model) for whole in WHOLE[name])
    assert len(adapted(models[0])) >= 6  # query, key, value, output and two of the MLP


def is_whole(module):
    return hasattr(module, "original_module")


def test_a_complete_classifier_may_have_modules_named_like_heads(tmp_path):
    """Nothing of it is fresh; PEFT takes pre_classifier for a classifier, by the end of its name."""
    folder = save_encoder(tmp_path / "model", ENCODERS["distilbert"])
    DistilBertForSequenceClassification(copy.deepcopy(ENCODERS["distilbert"])).save_pretrained(folder)
    metrics = finetune(settings(tmp_path, folder))
    assert loss_of(reloaded(folder, tmp_path / "run", 1), folder) == pytest.approx(metrics["eval_loss"], rel=1e-5)


def test_a_language_model_without_a_head_saves_the_one_it_was_given(tmp_path):
    folder = save_encoder(tmp_path / "model", language_model().config)
    data = write_rows(tmp_path / "texts.jsonl", [{"text": text} for text in sentences(60)])
    run = settings(tmp_path, folder, task="causal-lm", data=data, eval_data=data)
    finetune(run)
    ids = torch.arange(5, 15)[None]
    logits = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), run.output).eval()
        logits.append(model(ids).logits)
    assert logits[0].equal(logits[1])


def test_a_weight_that_cannot_be_saved_is_named(tmp_path, monkeypatch):
    folder = save_encoder(tmp_path / "model")
    setup = BertForSequenceClassification.__init__

    def with_scale(self, config):
        setup(self, config)
        self.scale = torch.nn.Parameter(torch.ones(1))

    monkeypatch.setattr(BertForSequenceClassification, "__init__", with_scale)
    with pytest.raises(ValueError, match="lacks a weight of BertForSequenceClassification"):
        finetune(settings(tmp_path, folder))


# Targets


@pytest.mark.parametrize(
    ("given", "expected"), [("query,value", {"query", "value"}), ("query", {"query"}), ("query, key", {"query", "key"})]
)
def test_target_modules_are_separated_by_commas(tmp_path, given, expected):
    run = settings(tmp_path, save_classifier(tmp_path / "model"))
    names = ("model", "data", "task", "output")
    arguments = [f"--{name}={getattr(run, name)}" for name in names]
    assert main(["finetune", *arguments, "--r", "2", "--max-steps", "1", "--target-modules", given]) == 0
    assert PeftConfig.from_pretrained(run.output).target_modules == expected
    layers = adapted(reloaded(run.model, run.output, 0))
    assert {layer.split(".")[-1] for layer in layers} == expected


def test_a_target_that_the_model_lacks_is_named(tmp_path):
    folder = save_classifier(tmp_path / "model")
    for targets, missing in (("query,valeu", "valeu"), ("uery", "uery"), ("query,", "")):
        with pytest.raises(ValueError, match=f"target_modules='{targets}': .* has no module named {missing}\\."):
            finetune(settings(tmp_path, folder, target_modules=targets))
