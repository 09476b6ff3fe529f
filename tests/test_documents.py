"""The Python blocks of README and of the documentation run, on stand-ins for what they leave open."""

from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import transformers
from helpers_documents import DOCUMENTS, LEFT_OUT, ROOT, blocks, commands, reason_to_leave_out
from helpers_gauss_newton import token_rows
from helpers_runs import language_model, save_language_model
from peft import get_peft_model
from safetensors.torch import load_file

import peft_scalora
from peft_scalora import ScaLoRAConfig, stability

CONFIG = ScaLoRAConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", scaling="column", scaling_interval=2)


def stand_in_trainer(*args, **kwargs) -> transformers.Trainer:
    """Return a Trainer of a new tiny model, with whatever callbacks a block gives; `...` stands for the rest."""
    arguments = transformers.TrainingArguments(
        output_dir=kwargs.pop("output_dir", "run"),
        max_steps=12,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    given = {name: value for name, value in kwargs.items() if name in ("callbacks", "optimizers")}
    model = kwargs.get("model") or get_peft_model(language_model(), CONFIG)
    return transformers.Trainer(model=model, args=arguments, train_dataset=token_rows(), **given)


def train_a_little(model: torch.nn.Module) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    rows = torch.tensor(token_rows(8)["input_ids"])
    for _ in range(12):
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture
def names(tmp_path, monkeypatch) -> dict:
    """Return what the blocks of a document find defined: everything public, and a stand-in for what they leave open."""
    monkeypatch.chdir(tmp_path)
    base = save_language_model(tmp_path / "base")
    load = transformers.AutoModelForCausalLM.from_pretrained

    def load_tiny(name, *args, **kwargs):
        return load(name if Path(name).exists() else base, *args, **kwargs)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load_tiny)
    trained = get_peft_model(language_model(), CONFIG)
    train_a_little(trained)
    trained.save_pretrained("adapter")
    public = {name: getattr(peft_scalora, name) for name in peft_scalora.__all__}
    public |= {name: getattr(stability, name) for name in stability.__all__}
    trainer = stand_in_trainer()
    trainer.train()
    trainer.state.save_to_json("run/trainer_state.json")
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(torch.optim.SGD(trained.parameters(), lr=1e-3), 100)
    return public | {
        "torch": torch,
        "transformers": transformers,
        "Trainer": stand_in_trainer,
        "trainer": trainer,
        "model": trained,
        "base_model": language_model(),
        "optimizer": torch.optim.AdamW(trained.parameters(), lr=1e-3),
        "DIR": "searches",
        "cosine": cosine,
        # Searches of many runs, which have tests of their own.
        "sweep_learning_rate": lambda make, **settings: SimpleNamespace(unstable_base_learning_rate=1.0),
        "search_warmup": lambda make, rate, **settings: SimpleNamespace(warmup_steps=10),
    }


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if blocks(d, "python")], ids=lambda path: path.name)
def test_python_blocks_run(document, names):
    if document.name == "stability.md":  # which changes models before they have adapters
        names["model"] = names["base_model"]
        names["trainer"] = stand_in_trainer(model=names["base_model"])
    if document.name == "serving.md":
        pytest.importorskip("diffusers")
        from test_lora_only import tiny_unet

        names |= {"unet": tiny_unet(), "load_file": load_file, "pipeline": mock.Mock()}
    for block in blocks(document, "python"):
        exec(compile(block, document.name, "exec"), names)


def test_the_page_of_other_tools_shows_the_example_that_is_tested():
    comment, example = (ROOT / "examples" / "axolotl.yaml").read_text().split("\n", 1)
    assert comment.startswith("#")
    assert f"```yaml\n{example}```" in (ROOT / "docs" / "integrations.md").read_text()


def test_the_walk_runs_every_command_but_those_with_a_reason():
    every = [command for document in DOCUMENTS for command in commands(document)]
    assert all(any(command.startswith(start) for command in every) for start in LEFT_OUT)
    assert sum(reason_to_leave_out(command) is None for command in every) > 15
    assert not any("$" in command or "[" in command.split("'")[0] for command in every), "not as one types it"
