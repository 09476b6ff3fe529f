"""eval/methods.py: every method on tiny models, against models that are cut, masked and counted by hand."""

import gzip
import json
import math
import os
import re
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import helpers_commonsense
import pytest
import torch
from helpers_models import tiny_bert, tiny_gpt2
from helpers_runs import classification_rows, save_tokenizer
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments, set_seed

from eval import methods
from eval.harness import training as harness_training
from eval.harness.training import Training
from eval.optimizing import common, hyperparameters, pruning, quantization, structure
from eval.optimizing.common import Row
from eval.optimizing.common import load as load_plain
from eval.optimizing.tasks import TaskSettings, load_task

# runs


def save_model(folder):
    """Wide enough for the 4-bit kernels of both libraries."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=20, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=384,
        max_position_embeddings=32, initializer_range=0.2, num_labels=2,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder)
    save_tokenizer(folder)
    return str(folder)


def save_rows(folder):
    path = folder / "glue" / "sst2"
    path.mkdir(parents=True)
    for split in ("train", "validation"):
        with gzip.open(path / f"{split}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in classification_rows(60))
    return str(folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Model, data, and where results go."""
    folder = tmp_path_factory.mktemp("methods")
    return folder, save_model(folder / "model"), save_rows(folder / "data")


def arguments(place, output, *others):
    folder, model, data = place
    given = {"model": model, "data-dir": data, "steps": 3, "batch-size": 8, "warmup-steps": 1, "dev-rows": 20, "r": 2}
    given |= {"search-trials": 2, "models": folder / "models", "output": folder / output}
    return [text for name, value in given.items() for text in (f"--{name}", str(value))] + list(others)


@pytest.fixture(scope="module")
def run(place):
    """A run whose rows are built in this process."""
    _, training = methods.parsed(arguments(place, "here"))
    settings = TaskSettings(place[1], data_dir=place[2], dev_rows=20)
    return methods.Run(
        load_task(settings), settings, training, 1e-3, 2, str(place[0] / "built"), str(place[0] / "here")
    )


def built(run, name):
    """Build the row and what it needs; its result."""
    for row in methods.with_requirements([name]):
        if not os.path.isdir(run.folder(row)) or row == name:
            result = {}
            module, context = methods.MODULE_OF[row], run.context(row)
            assert run._unfit(methods.row_of(row), module, context) is None
            run._build(module, methods.row_of(row), context, run.folder(row), result)
    return result


@pytest.mark.parametrize("name", methods.MODULE_OF)
def test_every_row_is_the_same_after_loading(run, name):
    result = built(run, name)
    again = methods.MODULE_OF[name].load(run.folder(name))
    assert result["score"] == vars(run.task.score(again, "test"))
    assert not [path for path in Path(run.folder(name)).rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]


def test_merging_fills_zeros_which_are_set_again(run):
    pruned, result = built(run, "l1-70"), built(run, "l1-70+scalora")
    assert result["nonzeros"] <= pruned["nonzeros"]
    assert result["merged_without_mask"]["nonzeros"] > 2 * pruned["nonzeros"]


def test_quantized_values_are_near_the_weights(run):
    """Counting reads the weights through the packing: a wrong reading would not be near."""
    built(run, "torchao-int4")
    dense, packed = load_plain(run.folder("dense")), quantization.load(run.folder("torchao-int4"))
    weight = dense.bert.encoder.layer[0].output.dense.weight.float()
    identity = torch.eye(weight.shape[1], dtype=torch.bfloat16)
    layer = packed.bert.encoder.layer[0].output.dense
    read = nn.functional.linear(identity, layer.weight).T.float()
    groups = weight.reshape(len(weight), -1, quantization.GROUP)
    step = (groups.amax(-1) - groups.amin(-1)) / 15
    assert ((read - weight).abs() <= 0.6 * step.repeat_interleave(quantization.GROUP, 1) + 1e-2).all()
    assert os.path.getsize(Path(run.folder("torchao-int4")) / quantization.PACKED) < 0.3 * os.path.getsize(
        Path(run.folder("dense")) / "model.safetensors"
    )


@contextmanager
def interrupted(monkeypatch, after):
    """Trainer is broken off in the step that follows `after` ones; yields a list of those, which all clocks count."""
    step, done = Trainer.training_step, []

    def counted(*given, **options):
        if len(done) == after:
            raise KeyboardInterrupt
        done.append(1)
        return step(*given, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", counted)
        for module in (methods, common, hyperparameters, harness_training):
            patch.setattr(module, "clock", lambda: len(done))
        yield done


def trained_by_trainer(run, folder, **arguments):
    """All weights of a fresh model, trained by transformers alone."""
    set_seed(run.training.seed)
    model = BertForSequenceClassification.from_pretrained(run.task_settings.model)
    given = {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 1, "seed": run.training.seed}
    given |= {"save_strategy": "no", "report_to": "none", "use_cpu": True, "remove_unused_columns": False}
    args = TrainingArguments(str(folder), **given, **arguments)
    trainer = Trainer(model, args, run.task.collator, run.task.train)
    trainer.model_accepts_loss_kwargs = False  # its loss is a mean over a batch
    trainer.train()
    return model


def test_search_continues_and_trains_with_the_best(run, tmp_path, monkeypatch):
    """Trials are runs of the settings that the script has, and one that is broken off changes nothing."""
    search, row = methods.MODULE_OF["search"], methods.row_of("search")
    training = replace(run.training, accumulation_steps=2, weight_decay=0.5, save_steps=1)
    whole, broken = (
        replace(run.context("search"), training=training, scratch=str(tmp_path / name), search_trials=2)
        for name in ("whole", "broken")
    )
    study = search.search(row, whole)
    assert len({trial.params["learning_rate"] for trial in study.trials}) == 2
    with interrupted(monkeypatch, after=3), pytest.raises(KeyboardInterrupt):
        search.search(row, broken)
    resumed = search._complete(search.search(row, broken))
    assert [(t.params, t.value) for t in resumed] == [(t.params, t.value) for t in study.trials]
    assert not list((tmp_path / "broken").glob("trial-*"))

    model = search.build(row, whole, str(tmp_path / "model"))
    assert whole.figures["best"] == study.best_params and len(whole.figures["trials"]) == 2
    assert run.task.score(model, "dev").metrics["accuracy"] == study.best_value == max(t.value for t in study.trials)
    best = study.best_params
    by_trainer = trained_by_trainer(
        run,
        tmp_path,
        learning_rate=best["learning_rate"],
        max_steps=round(best["share"] * training.steps * training.batch_size / best["batch_size"]),
        per_device_train_batch_size=best["batch_size"],
        gradient_accumulation_steps=2,
        weight_decay=0.5,
    )
    for name, weight in by_trainer.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name


def test_a_row_that_was_interrupted_has_the_seconds_of_all_its_steps(run, tmp_path, monkeypatch):
    own = replace(run, training=replace(run.training, save_steps=1), models=str(tmp_path), output=str(tmp_path))
    given = methods.MODULE_OF["dense"], methods.row_of("dense"), own.context("dense"), own.folder("dense")
    with interrupted(monkeypatch, after=2), pytest.raises(KeyboardInterrupt):
        own._build(*given, {})
    result = {}
    with interrupted(monkeypatch, after=99) as steps:
        own._build(*given, result)
    assert (len(steps), result["seconds"]) == (1, 3)


def one_step_of_the_head(context, model) -> torch.Tensor:
    """What one step of ScaLoRA without dropout changes in the head's weights, which have to be in float32."""
    before = model.classifier.weight.detach().float().clone()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    after = context.fine_tune(model, "scalora").base_model.classifier.modules_to_save.default.weight
    assert after.dtype == torch.float32
    return after.detach() - before


@pytest.mark.parametrize("name", ["scalora", "torchao-int8+scalora", "bnb-nf4+scalora"])
def test_a_step_of_the_head_arrives_whatever_the_base_is_in(run, tmp_path, name):
    """AdamW's first step is the learning rate, in every weight; bfloat16 has ten times wider gaps near 0.2."""
    built(run, "dense")
    training = replace(run.training, dtype="bfloat16", learning_rate=1e-4, steps=1, warmup_steps=0)
    context, row = replace(run.context(name), training=training, scratch=str(tmp_path / "half")), methods.row_of(name)
    found = one_step_of_the_head(
        context, context.base(row) if name == "scalora" else quantization.quantized(row, context)
    )
    whole = replace(context, training=replace(training, dtype="float32"), scratch=str(tmp_path / "single"))
    expected = one_step_of_the_head(whole, whole.base(row))
    for change in (found, expected):
        assert torch.allclose(change.abs(), torch.tensor(1e-4), rtol=0.01)
    assert (found.sign() == expected.sign()).double().mean() > 0.8


def test_a_merged_model_is_all_in_the_type_of_its_base(run, tmp_path):
    own = replace(run, training=replace(run.training, dtype="bfloat16"), models=str(tmp_path), output=str(tmp_path))
    result = built(own, "scalora")
    again = load_plain(own.folder("scalora"))
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    assert result["score"] == vars(run.task.score(again, "test"))


def test_rows_go_through_a_fresh_process_into_the_table(place):
    """A plain model, one with fewer heads, and an adapter on a quantized one; and nothing is done twice."""
    output = place[0] / "fresh"
    given = arguments(place, "fresh", "--methods", "heads", "torchao-int8+scalora")
    assert methods.main(given) == 0
    results = {path.name: json.loads(path.read_text()) for path in output.glob("*.json")}
    assert set(results) == {f"{name}-seed0.json" for name in ("dense", "heads", "torchao-int8+scalora")}
    for name, result in results.items():
        assert result["status"] == "finished"
        assert result["reload"] == "equal", name
        assert result["memory_bytes"] > 0
        assert result["latency_ratio"] > 0
    table = (output / "methods.md").read_text()
    assert table.count("| equal |") == 3
    assert (output / "methods.png").read_bytes().startswith(b"\x89PNG")
    before = {path: path.stat().st_mtime_ns for path in output.glob("*.json")}
    assert methods.main(given) == 0
    assert before == {path: path.stat().st_mtime_ns for path in output.glob("*.json")}


def test_outputs_of_the_same_name_have_models_of_their_own(place, tmp_path, monkeypatch):
    fresh = {"latency_ratio": 1.0, "throughput_ratio": 1.0, "memory_bytes": 1}
    monkeypatch.setattr(
        methods, "in_fresh_process", lambda *_: fresh | {"score": {"metrics": {"accuracy": 1.0}, "predictions": []}}
    )
    weights = {}
    for name, rate in {"a": "1e-3", "b": "1e-2"}.items():
        output = ["--output", str(tmp_path / name / "tiny"), "--models", str(tmp_path / "models")]
        assert methods.main([*arguments(place, ""), *output, "--methods", "l1-50", "--full-learning-rate", rate]) == 0
        weights[name] = {path: path.read_bytes() for path in (tmp_path / "models").rglob("*-seed0/*.safetensors")}
    assert len(weights["a"]) == 2 and len(weights["b"]) == 4
    assert weights["a"].items() <= weights["b"].items()
    assert len(set(weights["b"].values())) == 4


@pytest.mark.parametrize("option", [["--save-adapter"], ["--eval-steps", "5"]])
def test_options_that_would_do_nothing_are_refused(place, capsys, option):
    with pytest.raises(SystemExit):
        methods.parsed(arguments(place, "here", *option))
    assert f"unrecognized arguments: {option[0]}" in capsys.readouterr().err


def test_what_does_not_fit_and_what_fails_are_rows(place, monkeypatch, tmp_path):
    """The others are done all the same."""
    fresh = {"latency_ratio": 1.0, "throughput_ratio": 1.0, "memory_bytes": 1}
    scores = []
    build = methods.Run._build

    def build_and_keep(*given):
        build(*given)
        scores.append(given[-1]["score"])

    monkeypatch.setattr(methods.Run, "_build", build_and_keep)
    monkeypatch.setattr(methods, "in_fresh_process", lambda *_: fresh | {"score": scores[-1] | {"hash": "another"}})
    monkeypatch.setattr(pruning, "prune_weights", lambda *_: 1 / 0)
    monkeypatch.setattr(structure, "misfit", lambda row, base: "no layer can go")
    given = [*arguments(place, "unfit"), "--models", str(tmp_path)]
    assert methods.main([*given, "--methods", "l1-20", "layers+scalora, torchao-int8", "bfloat16"]) == 1
    table = (place[0] / "unfit" / "methods.md").read_text()
    assert "| l1-20 | ZeroDivisionError: division by zero |" in table
    assert "| layers | no layer can go |" in table
    assert "| layers+scalora | it starts from 'layers', which there is none of |" in table
    assert "| layers+scalora, torchao-int8 | it starts from 'layers+scalora', which there is none of |" in table
    assert len(re.findall(r"\| (dense|bfloat16) \|.*\| differs \|", table)) == 2


# what does not fit


def test_reasons(monkeypatch):
    bert, gpt2 = tiny_bert(), tiny_gpt2()
    assert "layers of 'gpt2' are not known (known: bert, llama)" in pruning.misfit(pruning.ROWS["neurons"], gpt2)
    assert "layers of 'gpt2' are not known" in structure.misfit(structure.ROWS["layers"], gpt2)
    assert pruning.misfit(pruning.ROWS["l1-50"], gpt2) == "it has no linear layer to prune"
    little = Row("", options={"part": "heads", "amount": 0.1})
    assert pruning.misfit(little, bert) == "of 2 groups of heads in a layer none goes at an amount of 0.10"
    assert structure.misfit(Row("", options={"part": "layers", "amount": 0.1}), bert).startswith(
        "of 2 layers none goes"
    )
    assert "multiple of 32, not 16" in quantization.misfit(quantization.ROWS["bnb-nf4"], bert)
    assert "multiple of 32 inputs, not 16" in quantization.misfit(quantization.ROWS["torchao-int4"], bert)
    pruned = pruning.prune_units(bert, "heads", 0.5)
    assert "heads taken out" in quantization.misfit(quantization.ROWS["torchao-int8"], pruned)
    monkeypatch.setattr(quantization, "find_spec", lambda name: None)
    assert "torchao is not installed: pip install" in quantization.misfit(quantization.ROWS["torchao-int8"], bert)


def test_no_int4_kernel_is_a_reason(monkeypatch):
    def none(*_):
        raise RuntimeError("no kernel\nand a long trace")

    monkeypatch.setattr(quantization, "quantize_int4", none)
    wide = nn.Sequential(nn.Linear(32, 32))
    assert quantization._int4_misfit([wide[0]]) == "no int4 kernel for this CPU: no kernel"


# language models


@pytest.fixture(scope="module")
def language_run(tmp_path_factory):
    """A run on the commonsense tasks."""
    folder = tmp_path_factory.mktemp("language")
    model, data = helpers_commonsense.save_model(folder / "model"), helpers_commonsense.write_data(folder / "data")
    rows = {"train_rows": 48, "dev_rows": 8, "test_rows": 16}
    settings = TaskSettings(model, "commonsense", str(data), max_length=256, **rows)
    training = Training(model, steps=2, batch_size=4, warmup_steps=1, r=2)
    return methods.Run(load_task(settings), settings, training, 1e-3, 1, str(folder / "built"), str(folder / "here"))


@pytest.mark.parametrize("name", ["heads", "width", "bfloat16", "distilled", "layers+scalora, torchao-int8"])
def test_language_models_are_the_same_after_loading(language_run, name):
    result = built(language_run, name)
    again = methods.MODULE_OF[name].load(language_run.folder(name))
    assert result["score"] == vars(language_run.task.score(again, "test"))
    assert result["bytes"] < Path(language_run.folder("dense"), "model.safetensors").stat().st_size


def test_log_likelihood_is_of_the_answers_tokens(language_run):
    model = helpers_commonsense.causal_model()
    total = tokens = 0
    with torch.no_grad():
        for row in language_run.task.test:
            ids, labels = (torch.tensor(row[name]) for name in ("input_ids", "labels"))
            probabilities = model(ids[None]).logits[0].double().softmax(-1)
            answer = (labels != -100).nonzero()[:-1, 0]  # EOS is learned, and not scored
            total += sum(math.log(probabilities[i - 1, ids[i]]) for i in answer.tolist())
            tokens += len(answer)
    score = language_run.task.score(model, "test")
    assert score.metrics["log_likelihood"] == pytest.approx(total / tokens, rel=1e-5)


def test_unknown_methods_are_named():
    with pytest.raises(ValueError, match=r"methods=\['prune'\] must be among all, bfloat16, "):
        methods.chosen_rows(["l1-20", "prune"])


def test_rows_come_after_what_they_start_from():
    order = list(methods.with_requirements(["neurons, bnb-nf4+scalora", "l1-70+scalora"]))
    assert order == ["dense", "neurons", "neurons, bnb-nf4+scalora", "l1-70", "l1-70+scalora"]
    assert methods.chosen_rows(["structure", "l1-20"]) == ["l1-20", *structure.ROWS]
    assert set(methods.with_requirements(methods.chosen_rows(["all"]))) == set(methods.MODULE_OF)
