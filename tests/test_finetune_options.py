"""What a run can be told beside its method: where it starts, precision, evaluation on the way, several processes."""

import json
import os
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
from helpers_runs import save_classifier, save_language_model, sentences, write_rows
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback

from peft_scalora.finetuning.models import adapted_model
from peft_scalora.finetuning.run import FinetuneSettings, finetune, make_trainer


def settings(tmp_path, **overrides):
    defaults = dict(
        model=str(tmp_path / "model"),
        data=str(tmp_path / "rows.jsonl"),
        task="causal-lm",
        output=str(tmp_path / "run"),
        r=2,
        max_steps=4,
        scaling="column",
        scaling_interval=2,
        logging_steps=2,
    )
    if not (tmp_path / "model").exists():
        save_language_model(tmp_path / "model")
        write_rows(tmp_path / "rows.jsonl", [{"text": text} for text in sentences(60)])
    return FinetuneSettings(**defaults | overrides)


# Where it starts


@pytest.fixture
def plain_lora(tmp_path):
    """A plain LoRA adapter of the model with weights of its own, as a folder."""
    run = settings(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(run.model)
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(tmp_path / "lora")
    return model.eval()


def test_training_starts_from_a_plain_lora_adapter(tmp_path, plain_lora):
    started = adapted_model(settings(tmp_path, start_from=str(tmp_path / "lora")), None).eval()
    ids = torch.arange(5, 15)[None]
    assert torch.allclose(started(ids).logits, plain_lora(ids).logits, atol=1e-6)
    config = started.peft_config["default"]
    assert (config.peft_type, config.r, config.lora_alpha, config.target_modules) == (
        "SCALORA",
        3,
        5,
        {"q_proj", "v_proj"},
    )


def test_a_run_from_a_plain_adapter_grows_past_its_rank(tmp_path, plain_lora):
    run = settings(tmp_path, start_from=str(tmp_path / "lora"), learning_rate=3e-2, max_steps=20)
    assert finetune(run)["effective_rank"] > 3
    again = settings(tmp_path, start_from=run.output, output=str(tmp_path / "again"), max_steps=1, learning_rate=1e-6)
    finetune(again)
    one, two = (load_file(os.path.join(each.output, "adapter_model.safetensors")) for each in (run, again))
    key = next(name for name in one if "scalora_U" in name)
    assert one[key].any() and torch.allclose(one[key], two[key], atol=1e-4)


def test_what_is_no_lora_adapter_of_the_model_is_refused(tmp_path, plain_lora):
    with pytest.raises(ValueError, match="holds no adapter"):
        adapted_model(settings(tmp_path, start_from=str(tmp_path)), None)
    save_language_model(tmp_path / "model")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["q_proj"]}))
    with pytest.raises(ValueError, match="does not fit the model"):
        adapted_model(settings(tmp_path, start_from=str(tmp_path / "lora")), None)


# Precision and memory


@pytest.mark.parametrize(
    ("options", "dtype"),
    [({}, torch.float32), ({"dtype": "bfloat16"}, torch.bfloat16), ({"bf16": True}, torch.bfloat16)],
)
def test_base_weights_have_the_dtype_and_what_trains_is_float32(tmp_path, options, dtype):
    model = adapted_model(settings(tmp_path, **options), None)
    kinds = {parameter.requires_grad: parameter.dtype for parameter in model.parameters()}
    assert kinds == {True: torch.float32, False: dtype}


def test_weights_are_bfloat16_on_a_gpu(tmp_path, monkeypatch):
    from peft_scalora.finetuning.models import weights_dtype

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda: True)
    assert weights_dtype(settings(tmp_path)) is torch.bfloat16
    assert weights_dtype(settings(tmp_path, dtype="float32")) is torch.float32


def test_a_classifier_trains_in_bfloat16(tmp_path):
    rows = write_rows(tmp_path / "labelled.jsonl", [{"text": t, "label": i % 2} for i, t in enumerate(sentences(20))])
    model = save_classifier(tmp_path / "classifier")
    run = settings(tmp_path, model=model, data=rows, task="classification", dtype="bfloat16")
    assert finetune(run)["stability"]["advice"] == ""


def test_four_bits(tmp_path):
    pytest.importorskip("bitsandbytes")
    save_language_model(tmp_path / "model", hidden_size=64, intermediate_size=64)
    write_rows(tmp_path / "rows.jsonl", [{"text": text} for text in sentences(20)])
    run = settings(tmp_path, load_in_4bit=True, gradient_checkpointing=True)
    layers = [type(module).__name__ for module in adapted_model(run, None).modules()]
    assert "Linear4bit" in layers
    assert finetune(run)["steps"] == 4


def test_gradient_checkpointing_trains_the_same(tmp_path):
    losses = [
        finetune(settings(tmp_path, gradient_checkpointing=on, output=str(tmp_path / str(on))))["train_loss"]
        for on in (True, False)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


# Schedule and evaluation


def test_the_scheduler_is_the_one_named(tmp_path):
    trainer = make_trainer(settings(tmp_path, lr_scheduler_type="constant", warmup_ratio=0.0, learning_rate=3e-3))
    trainer.create_optimizer_and_scheduler(10)
    assert [trainer.lr_scheduler.lr_lambdas[0](step) for step in (0, 5, 9)] == [1, 1, 1]


def test_evaluation_during_training_stops_early_with_the_best_weights(tmp_path, monkeypatch):
    losses = iter([3.0, 2.0, 4.0, 5.0, 1.0])

    def evaluate(trainer, *args, **kwargs):
        metrics = {"eval_loss": next(losses)}
        trainer.log(metrics)
        trainer.control = trainer.callback_handler.on_evaluate(trainer.args, trainer.state, trainer.control, metrics)
        return metrics

    monkeypatch.setattr("transformers.Trainer.evaluate", evaluate)
    run = settings(tmp_path, max_steps=20, eval_steps=2, early_stopping_patience=2, learning_rate=1e-2)
    assert finetune(run)["steps"] == 8
    best = load_file(tmp_path / "run" / "checkpoint-4" / "adapter_model.safetensors")
    saved = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert best.keys() == saved.keys() and all(best[key].equal(saved[key]) for key in best)


def test_trackers_are_told(tmp_path, monkeypatch):
    class Tracker(TrainerCallback):
        pass

    monkeypatch.setitem(sys.modules["transformers.integrations"].INTEGRATION_TO_CALLBACK, "wandb", Tracker)
    trainer = make_trainer(settings(tmp_path, report_to="wandb"))
    assert any(isinstance(callback, Tracker) for callback in trainer.callback_handler.callbacks)


# Processes


@pytest.mark.parametrize(
    "launcher",
    [
        ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"],
        ["accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1", "--module"],
    ],
)
def test_two_processes_train_one_adapter(tmp_path, launcher):
    run = settings(tmp_path, batch_size=2)
    (tmp_path / "run.json").write_text(json.dumps(asdict(run)))
    command = [sys.executable, "-m", *launcher, "peft_scalora", "finetune", str(tmp_path / "run.json"), "--json"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count('"steps": 4') == 1  # one process speaks
    assert done.stderr.count("rows to train") == 1
    one = finetune(settings(tmp_path, batch_size=4, output=str(tmp_path / "one")))
    two = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert two["eval_loss"] == pytest.approx(one["eval_loss"], rel=1e-3)
