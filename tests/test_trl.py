"""TRL's trainers on ScaLoRA adapters: reference adapters, and what is sent to a generation server."""

import copy
import warnings

import pytest
import torch
import trl
import vllm_rules
from accelerate import Accelerator
from datasets import Dataset
from helpers_models import check_filled, distance, oracle, scalora_config, scalora_layers
from helpers_runs import WORDS, language_model, save_tokenizer, sentences
from peft import get_peft_model
from transformers import AutoTokenizer
from trl.experimental.async_grpo.async_grpo_trainer import save_lora_adapter
from trl.generation.vllm_generation import VLLMGeneration

from peft_scalora import effective_rank

IDS = torch.arange(5, 17).repeat(3, 1)
ARGUMENTS = {"report_to": "none", "use_cpu": True, "bf16": False, "learning_rate": 2e-2, "disable_tqdm": True}


@pytest.fixture
def tokenizer(tmp_path):
    save_tokenizer(tmp_path / "tokenizer")
    return AutoTokenizer.from_pretrained(tmp_path / "tokenizer")


def config():
    return scalora_config(target_modules="all-linear", task_type="CAUSAL_LM", accumulator_rank=8)


def trained():
    """A model whose adapter holds accumulated change already, and its logits."""
    model = get_peft_model(language_model(), config())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    for step in range(5):
        ids = torch.randint(5, 17, (4, 8), generator=torch.Generator().manual_seed(step))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    check_filled(model)
    return model, logits(model)


@torch.no_grad()
def logits(model, adapter="default"):
    model.set_adapter(adapter)
    training = model.training
    result = model.eval()(input_ids=IDS).logits
    model.set_adapter("default")
    model.train(training)
    return result


def check_reference(trainer, start):
    """The reference is the adapter as it was before training, which has moved the adapter itself."""
    with pytest.warns(UserWarning, match="'ref' .*configuration object of 'default'.*copy"):
        trainer = trainer()
    model = trainer.model
    assert distance(logits(model, "ref"), start) < 1e-6
    trainer.train()
    assert distance(logits(model, "ref"), start) < 1e-6
    assert distance(logits(model), start) > 1e-2
    assert distance(logits(model), oracle(language_model(), model, IDS)) < 1e-4
    for layer in scalora_layers(model).values():
        assert layer.progress("ref").rescalings == 5 < layer.progress("default").rescalings
        assert not any(factor.requires_grad for factor in layer.factors("ref"))
    return trainer


def test_sft_trainer(tmp_path, tokenizer):
    trainer = trl.SFTTrainer(
        model=language_model(),
        args=trl.SFTConfig(str(tmp_path), max_steps=12, max_length=16, per_device_train_batch_size=4, **ARGUMENTS),
        train_dataset=Dataset.from_list([{"text": text} for text in sentences(32)]),
        processing_class=tokenizer,
        peft_config=config(),
    )
    trainer.train()
    assert max(effective_rank(trainer.model).values()) > 2 * config().r
    assert distance(logits(trainer.model), oracle(language_model(), trainer.model, IDS)) < 1e-4


def test_dpo_trainer_compares_with_the_whole_adapter(tmp_path, tokenizer):
    model, start = trained()
    pairs = [{"prompt": text, "chosen": " cat sat", "rejected": " dog ran"} for text in sentences(16)]

    def trainer():
        arguments = trl.DPOConfig(
            str(tmp_path), max_steps=3, per_device_train_batch_size=4, logging_steps=1, max_length=16, **ARGUMENTS
        )
        return trl.DPOTrainer(model, args=arguments, train_dataset=Dataset.from_list(pairs), processing_class=tokenizer)

    log = check_reference(trainer, start).state.log_history
    margins = [entry["rewards/margins"] for entry in log if "rewards/margins" in entry]
    assert margins[0] == 0, "before the first step, policy and reference are the same"
    assert all(margin != 0 for margin in margins[1:])


def test_dpo_trainer_on_a_fresh_adapter_compares_with_the_base(tmp_path, tokenizer):
    pairs = [{"prompt": text, "chosen": " cat sat", "rejected": " dog ran"} for text in sentences(16)]
    trainer = trl.DPOTrainer(
        language_model(),
        args=trl.DPOConfig(
            str(tmp_path), max_steps=3, per_device_train_batch_size=4, logging_steps=1, max_length=16, **ARGUMENTS
        ),
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
        peft_config=config(),
    )
    trainer.train()
    margins = [entry["rewards/margins"] for entry in trainer.state.log_history if "rewards/margins" in entry]
    assert margins[0] == 0 and margins[1] != 0
    with trainer.model.disable_adapter():
        assert torch.equal(logits(trainer.model), language_model().eval()(input_ids=IDS).logits)


def test_grpo_trainer_compares_with_the_whole_adapter(tmp_path, tokenizer):
    model, start = trained()

    def trainer():
        arguments = trl.GRPOConfig(
            str(tmp_path), max_steps=3, per_device_train_batch_size=4, num_generations=4, beta=0.1, logging_steps=1,
            max_completion_length=6, **ARGUMENTS,
        )  # fmt: skip
        return trl.GRPOTrainer(
            model,
            reward_funcs=lambda completions, **kwargs: [float(len(set(text))) for text in completions],
            args=arguments,
            train_dataset=Dataset.from_list([{"prompt": word} for word in WORDS]),
            processing_class=tokenizer,
        )

    log = check_reference(trainer, start).state.log_history
    divergence = [entry["kl"] for entry in log if "kl" in entry]
    assert divergence[0] == 0 and divergence[-1] > 0


def test_weights_for_the_generation_server_hold_the_whole_change():
    """What GRPO sends to vLLM: every weight of the base model under its own name, adapter merged."""
    model, start = trained()
    base = language_model()
    generation = VLLMGeneration.__new__(VLLMGeneration)  # without starting a server
    generation.model, generation.accelerator = model, Accelerator(cpu=True)
    generation._dist = trl.distributed.DistributedBackend(generation.accelerator)
    sent = {name: weight.clone() for name, weight in generation._iter_named_params()}
    assert sent.keys() == dict(base.named_parameters()).keys()
    base.load_state_dict(sent)
    assert distance(base.eval()(input_ids=IDS).logits, start) < 1e-5
    assert not any(layer.merged for layer in scalora_layers(model).values())
    assert distance(logits(model), start) < 1e-5


def test_the_adapter_that_async_grpo_sends_is_refused_by_the_server(tmp_path):
    """It knows lora_A and lora_B alone; without the rest it would serve another model."""
    save_lora_adapter(trained()[0], Accelerator(cpu=True), "default", str(tmp_path / "adapter"))
    with pytest.raises(vllm_rules.Refused, match="scalora_U"):
        vllm_rules.load(tmp_path / "adapter", 512)


# The copies that reference adapters are.


def test_an_adapter_with_a_configuration_of_its_own_is_fresh():
    model, start = trained()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.add_adapter("fresh", copy.deepcopy(model.peft_config["default"]))
    assert torch.equal(logits(model, "fresh"), language_model().eval()(input_ids=IDS).logits)
    assert distance(logits(model), start) < 1e-6


def test_a_configuration_used_twice_before_training_makes_fresh_adapters():
    shared = config()
    model = get_peft_model(language_model(), shared)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.add_adapter("second", shared)
    layer = next(iter(scalora_layers(model).values()))
    assert not torch.equal(layer.factors("default")[1], layer.factors("second")[1])
