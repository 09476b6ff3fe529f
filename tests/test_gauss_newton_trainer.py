"""Gauss-Newton under an unmodified Trainer and SFTTrainer."""

import gc
import logging
import weakref

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from helpers_gauss_newton import ADAPTERS, Gradients, make_model, make_trainer, token_rows, trainable
from helpers_runs import language_model, save_tokenizer, sentences
from torch.func import functional_call
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from peft_scalora import GaussNewton, GaussNewtonCallback, GaussNewtonConfig
from peft_scalora.gauss_newton import matrix_names
from peft_scalora.gauss_newton.callback import take_over


class Batches:
    """Keeps the batches as the model gets them."""

    def __init__(self, model):
        self.seen = []
        model.register_forward_pre_hook(lambda m, a, k: self.seen.append(dict(k)), with_kwargs=True)


@pytest.mark.parametrize("config", [{}, {"variant": "prox_linear", "layerwise": True}], ids=["gn", "layerwise"])
def test_equals_a_loop_of_ones_own(tmp_path, config):
    model = make_model()
    batches = Batches(model)
    trainer = make_trainer(tmp_path, config, model=model, lr_scheduler_type="constant")
    start = {name: p.clone() for name, p in model.state_dict().items()}
    trainer.train()
    by_trainer = trainable(model)

    model.load_state_dict(start)
    model.get_base_model().set_attn_implementation("eager")
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    settings = GaussNewtonConfig(inner_steps=4, **config)
    optimizer = GaussNewton(named, settings, lr=2e-2, betas=(0.9, 0.999), muon=matrix_names(model))
    model.train()
    for batch in batches.seen[: trainer.state.global_step]:
        labels = batch["labels"]

        def forward(params, ids=batch["input_ids"]):
            return functional_call(model, params, kwargs={"input_ids": ids}).logits

        def loss(logits, labels=labels):
            return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

        optimizer.loss(forward, loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.progress["outer_steps"] == 3
    for name, p in trainable(model).items():
        torch.testing.assert_close(p, by_trainer[name], rtol=1e-3, atol=1e-4)  # Muon works in bfloat16
        assert not torch.equal(p, start[name])


@pytest.mark.parametrize(("adapter", "stop"), [*((name, 7) for name in ADAPTERS), ("lora", 4)])
def test_resume_equals_the_unbroken_run(tmp_path, adapter, stop):
    # Step 7 is in an inner loop, with δ carried over or not, step 4 before a line search.
    saving = {"save_strategy": "steps", "save_steps": stop, "gradient_accumulation_steps": 2}
    whole = make_trainer(tmp_path / "whole", adapter=adapter, **saving)
    whole.train()
    resumed = make_trainer(tmp_path / "resumed", adapter=adapter, **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{stop}"))
    assert resumed.state.global_step == 15
    left, right = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(left[name], right[name]) for name in left)
    tail = [entry for entry in whole.state.log_history if "loss" in entry][-1]
    assert resumed.state.log_history[-2]["gauss_newton/loss"] == tail["gauss_newton/loss"]


def test_committed_weights_are_evaluated_and_saved(tmp_path):
    class Watch(TrainerCallback):
        def __init__(self):
            self.weights = []

        def on_step_end(self, args, state, control, model=None, **kwargs):
            self.weights.append(trainable(model))

    watch = Watch()
    trainer = make_trainer(tmp_path, callbacks=[watch], eval_strategy="steps", eval_steps=1)
    trainer.train()
    evaluations = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(evaluations) == 15
    for first in (0, 5, 10):  # steps 5, 10 and 15 commit
        assert len(set(evaluations[max(0, first - 1) : first + 4])) == 1
        for weights in watch.weights[max(0, first - 1) : first + 4]:
            assert all(torch.equal(weights[n], watch.weights[first][n]) for n in weights)
    assert len(set(evaluations)) == 4
    assert evaluations[-1] < evaluations[0]


def test_accumulation_equals_one_large_batch(tmp_path):
    steps = []
    for size, parts in ((8, 1), (2, 4)):
        gradients = Gradients()
        make_trainer(
            tmp_path,
            {"inner_optimizer": "adamw"},
            callbacks=[gradients],
            per_device_train_batch_size=size,
            gradient_accumulation_steps=parts,
            max_steps=6,
        ).train()
        steps.append(gradients.steps)
    for whole, accumulated in zip(*steps):
        for name in whole:
            torch.testing.assert_close(whole[name], accumulated[name], rtol=1e-3, atol=1e-5)
    assert not any(g.any() for g in steps[0][4].values())  # a line search has no gradient
    assert any(g.any() for g in steps[0][3].values())


def test_all_that_was_installed_is_taken_away(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=5)
    model = trainer.model
    assert model.config._attn_implementation == "sdpa"
    trainer.train()
    assert "forward" not in model.__dict__
    assert model.config._attn_implementation == "sdpa"
    assert type(trainer.optimizer.optimizer) is torch.optim.AdamW
    batch = {name: torch.tensor(token_rows(2)[name]) for name in ("input_ids", "labels")}
    model(**batch).loss.backward()
    trainer.train()  # and it can train again


def test_layers_are_the_models_whatever_trainers_groups(tmp_path):
    sizes = dict(vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    model = BertForSequenceClassification(BertConfig(**sizes))
    trainer = Trainer(model, TrainingArguments(str(tmp_path), weight_decay=0.1, use_cpu=True, report_to="none"))
    taken = take_over(trainer.create_optimizer(), model, GaussNewtonConfig(layerwise=True))
    assert [len(group["params"]) for group in taken.param_groups] == [17, 24]
    blocks = [[n for n, _ in model.named_parameters() if n.startswith(f"bert.encoder.layer.{i}.")] for i in range(2)]
    embedding = [n for n, _ in model.named_parameters() if n.startswith("bert.embeddings.")]
    head = ["bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"]
    assert taken.layers == [embedding, *blocks, head]


# Trainings that do not reach their end: Trainer tells no callback.


def assert_untouched(model, attention="sdpa"):
    """`model` gives the gradients of a fresh one with the same weights, and nothing of Gauss-Newton is left."""
    batch = {name: torch.tensor(token_rows(2)[name]) for name in ("input_ids", "labels")}
    fresh = make_model()
    fresh.load_state_dict(model.state_dict())
    for each in (model, fresh):
        each.zero_grad()
        each.train()
        each(**batch).loss.backward()
    wanted = dict(fresh.named_parameters())
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, wanted[name].grad)
    assert "forward" not in model.__dict__
    assert model.config._attn_implementation == attention


class Interrupt(TrainerCallback):
    """Ctrl-C in the second step's `event`."""

    def __init__(self, event):
        def interrupt(args, state, control, **kwargs):
            if state.global_step >= 1:
                raise KeyboardInterrupt

        setattr(self, event, interrupt)


def interrupted(folder, event, model=None):
    trainer = make_trainer(folder, callbacks=[Interrupt(event)], model=model, gradient_accumulation_steps=2)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    return trainer.model


@pytest.mark.parametrize("event", ["on_step_end", "on_pre_optimizer_step"])
def test_an_interrupted_training_leaves_the_models_own_loss(tmp_path, event):
    assert_untouched(interrupted(tmp_path, event), attention="eager")


def test_a_forward_pass_that_is_interrupted_puts_everything_back(tmp_path):
    calls = []

    def loss(logits, labels, num_items_in_batch=None):
        calls.append(None)
        if len(calls) > 4:
            raise KeyboardInterrupt
        total = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
        return total / num_items_in_batch

    trainer = make_trainer(tmp_path, loss=loss)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert type(trainer.optimizer.optimizer) is torch.optim.AdamW
    assert_untouched(trainer.model)


def test_the_next_training_puts_back_what_an_interrupted_one_left(tmp_path):
    trained = []
    for model in (make_model(), interrupted(tmp_path, "on_substep_end", make_model())):
        model.load_state_dict(make_model().state_dict())
        make_trainer(tmp_path, model=model).train()
        trained.append(model)
        assert_untouched(model)
    first, second = map(trainable, trained)
    assert all(torch.equal(p, second[name]) for name, p in first.items())


def test_errors_of_its_own_put_everything_back(tmp_path):
    half = make_model()
    next(p for p in half.parameters() if p.requires_grad).data = torch.zeros(2, 16, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="Gauss-Newton trains in float32"):
        make_trainer(tmp_path, model=half).train()
    assert half.config._attn_implementation == "sdpa" and "forward" not in half.__dict__
    trainer = make_trainer(tmp_path)
    trainer.train_dataset = trainer.train_dataset.remove_columns("labels")
    with pytest.raises(ValueError, match="training batch without labels"):
        trainer.train()
    assert_untouched(trainer.model)


def test_training_logs_and_ends_with_a_commit(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(tmp_path, max_steps=8, logging_steps=1)
        start = trainable(trainer.model)
        trainer.train()
    assert "attention 'sdpa' has no forward-mode rule; training uses 'eager'" in caplog.text
    assert "not in the weights" not in caplog.text
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert "gauss_newton/step_size" not in logs[3]
    assert [entry["gauss_newton/outer_step"] for entry in logs[4:]] == [1, 1, 1, 2]  # the second is 2 + 1 steps long
    assert all(0 <= entry["gauss_newton/step_size"] <= 1 for entry in logs[4:])
    assert logs[3]["grad_norm"] > 0 and logs[4]["grad_norm"] == 0
    assert not any(torch.equal(p, start[n]) for n, p in trainable(trainer.model).items())


def test_uncommitted_steps_are_mentioned(tmp_path, caplog):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 7

    with caplog.at_level(logging.WARNING):
        make_trainer(tmp_path, callbacks=[Stop()]).train()
    assert "its last 2 inner steps are not in the weights" in caplog.text


# Every trainer's and every task's loss: the first gradient is the ordinary one, because δ is 0.


def assert_same_first_gradient(runs):
    first, second = (gradients.steps[0] for gradients in runs)
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-3, atol=1e-6)
    assert sum(float(g.norm()) for g in first.values()) > 1e-3


@pytest.mark.parametrize("labels", ["classes", "floats"])
def test_sequence_classification(tmp_path, labels):
    runs = []
    for callback in ([], [GaussNewtonCallback(GaussNewtonConfig(inner_steps=3))]):
        torch.manual_seed(0)
        sizes = dict(vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
        model = BertForSequenceClassification(BertConfig(**sizes, num_labels=3 if labels == "classes" else 1))
        rows = [
            {"input_ids": row["input_ids"], "labels": i % 3 if labels == "classes" else 0.1 * i}
            for i, row in enumerate(token_rows(32))
        ]
        gradients = Gradients()
        arguments = TrainingArguments(
            str(tmp_path), max_steps=4, per_device_train_batch_size=4, report_to="none", use_cpu=True, seed=1,
            disable_tqdm=True, save_strategy="no",
        )  # fmt: skip
        Trainer(model, arguments, train_dataset=Dataset.from_list(rows), callbacks=[*callback, gradients]).train()
        runs.append(gradients)
    assert_same_first_gradient(runs)


def sft(folder, callbacks, model=None, **arguments):
    trl = pytest.importorskip("trl")
    save_tokenizer(folder / "tokenizer")
    settings = dict(
        output_dir=str(folder), per_device_train_batch_size=4, max_steps=10, learning_rate=2e-2, logging_steps=5,
        report_to="none", use_cpu=True, bf16=False, max_length=16, disable_tqdm=True, save_strategy="no",
        gradient_checkpointing=False,
    )  # fmt: skip
    return trl.SFTTrainer(
        model=model or language_model(),
        args=trl.SFTConfig(**settings | arguments),
        train_dataset=Dataset.from_list([{"text": text} for text in sentences(64)]),
        processing_class=AutoTokenizer.from_pretrained(folder / "tokenizer"),
        peft_config=ADAPTERS["lora"],
        callbacks=callbacks,
    )


def test_sft_trainer(tmp_path):
    runs = []
    for callback in ([], [GaussNewtonCallback(GaussNewtonConfig(inner_steps=4))]):
        gradients = Gradients()
        trainer = sft(tmp_path, [*callback, gradients], gradient_accumulation_steps=2)
        trainer.train()
        runs.append(gradients)
    assert_same_first_gradient(runs)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["gauss_newton/outer_step"] for entry in logs] == [1, 2]
    assert 2.5 < logs[1]["gauss_newton/loss"] < 3 and 2.5 < logs[1]["loss"] < 3  # nats a token
    assert 0 < logs[0]["entropy"] and 0 <= logs[0]["mean_token_accuracy"] <= 1


def test_token_weights_that_cannot_work_are_refused(tmp_path):
    class WeighTokens(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            batch = {name: torch.tensor(token_rows(2)[name]) for name in ("input_ids", "labels")}
            log_probs = model(**batch, fused_lm_head=True).log_probs
            with pytest.raises(ValueError, match="does not weigh all tokens alike"):
                (log_probs * torch.arange(log_probs.numel()).view_as(log_probs)).sum().backward()
            control.should_training_stop = True

    sft(tmp_path, [GaussNewtonCallback(), WeighTokens()], max_steps=1).train()
    with pytest.raises(ValueError, match="loss_type='dft': use loss_type='nll'"):
        sft(tmp_path, [GaussNewtonCallback()], loss_type="dft").train()


# Refusals, each before the first step.


@pytest.mark.parametrize(
    ("arguments", "config", "message"),
    [
        ({"bf16": True}, {}, "cannot train with bf16=True: it trains in float32; pass bf16=False"),
        ({"gradient_checkpointing": True}, {}, "gradient_checkpointing=True: .* pass gradient_checkpointing=False"),
        ({"torch_compile": True}, {}, "torch_compile=True"),
        ({"max_grad_norm": 1.0}, {"inner_optimizer": "cg"}, "max_grad_norm=1.0: .* pass max_grad_norm=0"),
        (
            {"weight_decay": 0.1, "max_grad_norm": 0.0},
            {"inner_optimizer": "cg"},
            "weight_decay=0.1: .* pass weight_decay=0",
        ),
        ({"label_smoothing_factor": 0.1}, {}, "without labels: .* label_smoothing_factor"),
    ],
    ids=lambda value: next(iter(value), None) if isinstance(value, dict) else None,
)
def test_settings_that_cannot_work_are_refused(tmp_path, arguments, config, message):
    trainer = make_trainer(tmp_path, config, **arguments)
    start = trainable(trainer.model)
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert all(torch.equal(p, start[n]) for n, p in trainable(trainer.model).items())


def test_models_that_cannot_work_are_refused(tmp_path):
    model = make_model()
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match=r"gradient checkpointing: .* model.gradient_checkpointing_disable\(\)"):
        make_trainer(tmp_path, model=model).train()
    model = make_model()
    model.get_base_model().is_quantized = True
    callback = GaussNewtonCallback()
    with pytest.raises(ValueError, match=r"quantized base model: .* Load it without a quantization_config"):
        callback.on_train_begin(make_trainer(tmp_path).args, None, None, model=model)
    half = language_model().bfloat16()
    with pytest.raises(ValueError, match="Gauss-Newton trains in float32"):
        make_trainer(tmp_path, model=half).train()


def test_an_operation_without_forward_mode_is_named_with_the_remedy(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path)
    monkeypatch.setattr(LlamaForCausalLM, "set_attn_implementation", lambda *_: None)
    with pytest.raises(NotImplementedError, match=r"forward-mode .* Switch off fused kernels .*'eager'"):
        trainer.train()


class ShiftedForCausalLM(LlamaForCausalLM):
    """Adds to its loss something that no function of the logits gives."""

    def forward(self, input_ids=None, labels=None, **kwargs):
        outputs = super().forward(input_ids=input_ids, labels=labels, **kwargs)
        outputs.loss = None if outputs.loss is None else outputs.loss + 1.0
        return outputs


def test_a_loss_that_is_not_a_function_of_the_logits_is_refused_not_dropped(tmp_path):
    model = ShiftedForCausalLM(language_model().config)
    with pytest.raises(ValueError, match=r"ShiftedForCausalLM computes a loss of .* pass GaussNewtonCallback\("):
        make_trainer(tmp_path, model=model).train()

    def loss(logits, labels, num_items_in_batch=None):
        total = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
        return total / num_items_in_batch + 1.0

    trainer = make_trainer(tmp_path, model=ShiftedForCausalLM(language_model().config), loss=loss)
    trainer.train()
    assert trainer.state.log_history[-2]["gauss_newton/loss"] > 1.0


class PlainClassifier(torch.nn.Module):
    """Not a transformers model: no config, a dict of outputs."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 2)

    def forward(self, x, labels=None):
        logits = self.linear(x)
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


def test_a_plain_module_trains_with_a_loss_of_its_own(tmp_path):
    torch.manual_seed(0)
    rows = torch.randn(64, 4)
    data = [{"x": row, "labels": int(row[0] > 0)} for row in rows]
    runs = []

    def loss(logits, labels):
        return F.cross_entropy(logits, labels)

    for callback in ([], [GaussNewtonCallback(GaussNewtonConfig(inner_steps=3), loss)]):
        torch.manual_seed(0)
        gradients = Gradients()
        arguments = TrainingArguments(
            str(tmp_path), max_steps=20, per_device_train_batch_size=8, report_to="none", use_cpu=True, seed=1,
            disable_tqdm=True, save_strategy="no", learning_rate=0.1,
        )  # fmt: skip
        model = PlainClassifier()
        Trainer(model, arguments, train_dataset=data, callbacks=[*callback, gradients]).train()
        runs.append(gradients)
    assert_same_first_gradient(runs)
    labels = (rows[:, 0] > 0).long()
    torch.manual_seed(0)
    assert F.cross_entropy(model.linear(rows), labels) < 0.8 * F.cross_entropy(PlainClassifier().linear(rows), labels)


def test_models_without_a_known_loss_are_refused():
    from peft_scalora.gauss_newton.forward import task_loss

    with pytest.raises(ValueError, match="loss of Linear is not known as a function of its logits: pass"):
        task_loss(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("inner_optimizer", ["muon", "cg"])
def test_a_trainer_that_is_gone_leaves_no_memory_behind(tmp_path, inner_optimizer):
    config = {"inner_optimizer": inner_optimizer}
    trainer = make_trainer(tmp_path, config, max_grad_norm=0.0)
    outputs = []
    trainer.model.register_forward_hook(lambda module, args, output: outputs.append(weakref.ref(output.logits)))
    trainer.train()
    model = weakref.ref(trainer.model)
    assert len(outputs) >= 15
    del trainer
    gc.collect()
    assert model() is None and not any(output() is not None for output in outputs)
