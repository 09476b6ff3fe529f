"""Adapters in the usual idiom of SentenceTransformers, Lightning and timm."""

import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from unittest import mock

import pytest
import torch
from helpers_integrations import TOKENS, check_adapter, check_language_model_in_a_new_process
from helpers_runs import save_encoder, save_language_model, sentences
from peft import get_peft_model
from transformers import AutoModel, AutoModelForCausalLM, set_seed

from peft_scalora import ScaLoRAConfig

ASK = "is not installed: make test-integrations"
SETTINGS = {"r": 2, "scaling": "column", "scaling_interval": 2}

TORCHVISION = ("ops", "ops.misc", "transforms", "transforms.functional", "datasets")


def test_sentence_transformers(tmp_path):
    sentence_transformers = pytest.importorskip(
        "sentence_transformers", reason=f"sentence-transformers {ASK}", exc_type=ImportError
    )
    from datasets import Dataset
    from sentence_transformers import losses

    base = save_encoder(tmp_path / "base")
    model = sentence_transformers.SentenceTransformer(base, device="cpu")
    model.add_adapter(ScaLoRAConfig(target_modules=["query", "value"], **SETTINGS))
    texts = sentences(32)
    rows = Dataset.from_dict({"anchor": texts, "positive": [f"{text} cat" for text in texts]})
    arguments = sentence_transformers.SentenceTransformerTrainingArguments(
        str(tmp_path / "run"), max_steps=20, per_device_train_batch_size=8, learning_rate=2e-2, use_cpu=True,
        report_to="none", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    loss = losses.MultipleNegativesRankingLoss(model)
    sentence_transformers.SentenceTransformerTrainer(model, arguments, rows, loss=loss).train()
    model.save_pretrained(str(tmp_path / "adapter"))

    again = sentence_transformers.SentenceTransformer(str(tmp_path / "adapter"), device="cpu")
    assert abs(again.encode(texts) - model.encode(texts)).max() < 1e-5
    check_adapter(
        tmp_path / "adapter", lambda: AutoModel.from_pretrained(base), tmp_path / "plain", {"input_ids": TOKENS}
    )


def test_lightning(tmp_path):
    lightning = pytest.importorskip("lightning", reason=f"lightning {ASK}")

    class Tuned(lightning.LightningModule):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def training_step(self, batch, index):
            return self.model(input_ids=batch, labels=batch).loss

        def configure_optimizers(self):
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=2e-2)

    base = save_language_model(tmp_path / "base")
    config = ScaLoRAConfig(target_modules="all-linear", task_type="CAUSAL_LM", **SETTINGS)
    module = Tuned(get_peft_model(AutoModelForCausalLM.from_pretrained(base), config))
    rows = torch.utils.data.DataLoader(torch.randint(5, 17, (32, 8)), batch_size=4)
    trainer = lightning.Trainer(
        max_steps=20, accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path
    )
    trainer.fit(module, rows)
    module.model.save_pretrained(tmp_path / "adapter")
    check_language_model_in_a_new_process(tmp_path / "adapter", base, tmp_path / "plain")


@pytest.fixture
def timm(monkeypatch):
    """timm, with a stand-in for torchvision, whose compiled part fits CUDA's torch alone; no model here calls it."""
    if find_spec("torchvision") is None:
        for name in ("torchvision", *(f"torchvision.{part}" for part in TORCHVISION)):
            module = mock.MagicMock(__spec__=ModuleSpec(name, None), __path__=[])
            monkeypatch.setitem(sys.modules, name, module)
    return pytest.importorskip("timm", reason=f"timm {ASK}")


def test_timm(timm, tmp_path):

    def build():
        set_seed(0)
        return timm.create_model(
            "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=3
        )

    config = ScaLoRAConfig(target_modules=["qkv", "fc1", "fc2"], modules_to_save=["head"], **SETTINGS)
    model = get_peft_model(build(), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    images = torch.randn(12, 3, 32, 32)
    for _ in range(20):
        torch.nn.functional.cross_entropy(model(images), torch.arange(12) % 3).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path / "adapter")
    check_adapter(tmp_path / "adapter", build, tmp_path / "plain", {"x": images})
