"""ScaLoRA under an unmodified Trainer and SFTTrainer."""

import pytest
import torch
from datasets import Dataset
from helpers_runs import language_model, save_tokenizer, sentences
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

from peft_scalora import (
    ScaLoRACallback,
    ScaLoRAConfig,
    StabilityCallback,
    StabilityConfig,
    effective_rank,
    last_report,
)


def config(**overrides):
    return ScaLoRAConfig(
        **dict(r=2, target_modules="all-linear", task_type="CAUSAL_LM", scaling="column", scaling_interval=3)
        | overrides
    )


def token_rows(count=64):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 17, (count, 8), generator=generator).tolist()
    return Dataset.from_list([{"input_ids": row, "labels": row} for row in ids])


def make_trainer(folder, callbacks=(), peft_config=None, model=None, **arguments):
    model = model or get_peft_model(language_model(), peft_config or config())
    settings = dict(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        max_steps=20,
        learning_rate=5e-3,
        save_steps=10,
        logging_steps=5,
        report_to="none",
        use_cpu=True,
        seed=1,
        disable_tqdm=True,
    )
    return Trainer(
        model=model,
        args=TrainingArguments(**settings | arguments),
        train_dataset=token_rows(),
        callbacks=list(callbacks),
    )


def assert_same_state(left, right):
    assert left.keys() == right.keys()
    for key in left:
        if isinstance(left[key], torch.Tensor):
            assert torch.equal(left[key], right[key]), key
        elif isinstance(left[key], dict):
            assert_same_state(left[key], right[key])


@pytest.mark.parametrize("stop", [10, 8])  # on and between rescalings, with an interval of 3
def test_resume_equals_the_unbroken_run(tmp_path, stop):
    whole = make_trainer(tmp_path / "whole", save_steps=stop)
    whole.train()
    resumed = make_trainer(tmp_path / "resumed", save_steps=stop)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{stop}"))
    assert resumed.state.global_step == 20
    assert_same_state(whole.model.state_dict(), resumed.model.state_dict())
    assert_same_state(
        whole.optimizer.optimizer.state_dict()["state"], resumed.optimizer.optimizer.state_dict()["state"]
    )
    assert any(tensor.abs().sum() > 0 for name, tensor in whole.model.state_dict().items() if "scalora_U" in name)


def test_training_rescales_and_leaves_the_base_untouched(tmp_path):
    trainer = make_trainer(tmp_path)
    before = {name: p.clone() for name, p in trainer.model.named_parameters() if "lora_" not in name}
    trainer.train()
    after = dict(trainer.model.named_parameters())
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert max(effective_rank(trainer.model).values()) > 2
    loaded = PeftModel.from_pretrained(language_model(), str(tmp_path / "checkpoint-20")).eval()
    ids = torch.tensor(token_rows(4)["input_ids"])
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, trainer.model.eval()(input_ids=ids).logits)


def test_accumulation_steps_are_not_optimizer_steps(tmp_path):
    trainer = make_trainer(tmp_path, gradient_accumulation_steps=4, max_steps=6)
    trainer.train()
    state = load_file(str(tmp_path / "checkpoint-6" / "adapter_model.safetensors"))
    steps = {tuple(v.tolist()[:2]) for key, v in state.items() if key.endswith("scalora_progress.weight")}
    assert steps == {(6, 2)}


def test_callback_logs_to_every_reporter_and_draws(tmp_path):
    class Reporter(TrainerCallback):
        def __init__(self):
            self.seen = []

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.seen.append(dict(logs))

    reporter = Reporter()
    trainer = make_trainer(tmp_path, callbacks=[reporter])
    trainer.add_callback(ScaLoRACallback(trainer))
    trainer.train()
    logged = [entry for entry in reporter.seen if "scalora/effective_rank" in entry]
    assert len(logged) == 4  # 20 steps, logged every 5
    assert len([entry for entry in reporter.seen if "loss" in entry]) == 4
    ranks = effective_rank(trainer.model)
    assert logged[-1]["scalora/effective_rank"] == pytest.approx(sum(ranks.values()) / len(ranks))
    assert logged[-1]["scalora/merged"] == 1
    shares = [logged[-1][f"scalora/{rule}"] for rule in ("column", "scalar", "exact", "skipped")]
    assert sum(shares) == pytest.approx(1)
    assert logged[-1]["scalora/fold_error"] < 1e-6
    assert logged[-1]["scalora/median_log_alpha"] == last_report(trainer.optimizer).median_log_alpha
    assert (tmp_path / "scalora_rank.png").read_bytes().startswith(b"\x89PNG")


def test_callback_without_the_trainer_writes_to_the_log_history(tmp_path):
    trainer = make_trainer(tmp_path, callbacks=[ScaLoRACallback(plot=False)])
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "scalora/effective_rank" in entry]
    assert [entry["step"] for entry in logged] == [5, 10, 15, 20]
    assert not (tmp_path / "scalora_rank.png").exists()


def test_callback_logs_every_epoch_and_lets_go_of_reports(tmp_path, monkeypatch):
    """More rescalings lie between two logs than reports are kept; the figures are of all of them."""
    seen = []

    class Collector(TrainerCallback):
        def on_step_end(self, args, state, control, optimizer=None, **kwargs):
            if state.global_step % 3 == 0:
                seen.append(last_report(optimizer))

    monkeypatch.setattr("peft_scalora.callbacks.MAX_PENDING", 2)
    trainer = make_trainer(tmp_path, [Collector()], logging_strategy="epoch", max_steps=-1, num_train_epochs=2)
    callback = ScaLoRACallback(trainer, plot=False)
    trainer.add_callback(callback)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "scalora/effective_rank" in entry]
    assert [entry["epoch"] for entry in logged] == [1, 2] and len(seen) == 10
    for entry, reports in zip(logged, (seen[:5], seen[5:])):
        layers = sum(report.layers for report in reports)
        assert entry["scalora/column"] == sum(report.column for report in reports) / layers
        assert entry["scalora/fold_error"] == max(report.fold_error for report in reports)
    assert entry["scalora/discarded"] == pytest.approx(sum(report.discarded for report in seen))


def test_callback_where_transformers_carries_the_adapter(tmp_path):
    model = language_model()
    model.add_adapter(config())
    trainer = make_trainer(tmp_path, callbacks=[ScaLoRACallback(plot=False)], model=model)
    trainer.train()
    logged = [e["scalora/effective_rank"] for e in trainer.state.log_history if "scalora/effective_rank" in e]
    ranks = effective_rank(model)
    assert logged[-1] == pytest.approx(sum(ranks.values()) / len(ranks))


def test_callback_means_over_all_active_adapters(tmp_path):
    model = get_peft_model(language_model(), config())
    model.add_adapter("other", config(r=3, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "other"])
    trainer = make_trainer(tmp_path, callbacks=[ScaLoRACallback(plot=False)], model=model)
    trainer.train()
    logged = [e["scalora/effective_rank"] for e in trainer.state.log_history if "scalora/effective_rank" in e]
    ranks = [*effective_rank(model).values(), *effective_rank(model, adapter_name="other").values()]
    assert logged[-1] == pytest.approx(sum(ranks) / len(ranks))


def test_callback_follows_plain_lora_too(tmp_path):
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = make_trainer(tmp_path, callbacks=[ScaLoRACallback(plot=False)], peft_config=lora)
    trainer.train()
    logged = [e["scalora/effective_rank"] for e in trainer.state.log_history if "scalora/effective_rank" in e]
    assert max(logged) == 2


def test_a_plain_lora_run_draws_no_empty_panels(tmp_path):
    def width(adapter, folder):
        trainer = make_trainer(folder, callbacks=[ScaLoRACallback()], peft_config=adapter)
        trainer.train()
        return int.from_bytes((folder / "scalora_rank.png").read_bytes()[16:20], "big")  # of a PNG, in pixels

    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    assert width(config(), tmp_path / "scalora") == 3 * width(lora, tmp_path / "lora")


def make_sft_trainer(folder, **arguments):
    trl = pytest.importorskip("trl")
    save_tokenizer(folder / "tokenizer")
    return trl.SFTTrainer(
        model=language_model(),
        args=trl.SFTConfig(
            output_dir=str(folder),
            per_device_train_batch_size=4,
            max_steps=9,
            learning_rate=5e-3,
            report_to="none",
            use_cpu=True,
            bf16=False,
            max_length=16,
            **arguments,
        ),
        train_dataset=Dataset.from_list([{"text": text} for text in sentences(64)]),
        processing_class=AutoTokenizer.from_pretrained(folder / "tokenizer"),
        peft_config=config(),
    )


def test_sft_trainer_needs_no_change(tmp_path):
    trainer = make_sft_trainer(tmp_path)
    trainer.train()
    assert max(effective_rank(trainer.model).values()) > 2


def test_metrics_of_sft_trainer_stay_with_the_loss(tmp_path):
    """TRL adds its metrics to the first log of a step; figures of the callbacks are in that one log too."""
    trainer = make_sft_trainer(tmp_path, logging_steps=3)
    trainer.add_callback(ScaLoRACallback(trainer, plot=False))
    trainer.add_callback(StabilityCallback(StabilityConfig(plot=False), trainer))
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "train_runtime" not in entry]
    assert [entry["step"] for entry in logged] == [3, 6, 9]
    for entry in logged:
        names = {"loss", "mean_token_accuracy", "scalora/effective_rank", "stability/grad_norm"}
        assert names <= entry.keys()
