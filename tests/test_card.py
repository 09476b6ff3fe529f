"""The heads of the cards of exported adapters and merged models: what the hub reads of them."""

import pytest
from helpers_models import KINDS
from huggingface_hub import ModelCard

from peft_scalora import export_lora
from peft_scalora.files.card import facts_of, merged_card, without_empty_sections


@pytest.fixture(scope="module")
def adapter():
    return KINDS["Linear"].filled()[1]


@pytest.mark.parametrize("name", [None, "", "/a/path/of/mine", "tests"])
def test_a_base_that_is_none_of_the_hubs_is_left_out(adapter, name, tmp_path, monkeypatch):
    """The hub takes the field for one of its models; a card that says "None" names a model of that name."""
    monkeypatch.setattr(adapter.peft_config["default"], "base_model_name_or_path", name)
    export_lora(adapter, tmp_path / "plain")
    data = ModelCard.load(tmp_path / "plain" / "README.md").data
    assert data.base_model is None
    assert data.library_name == "peft" and data.tags == ["lora", "scalora"]
    text = (tmp_path / "plain" / "README.md").read_text()
    assert "base_model:" not in text and "None" not in text


@pytest.mark.parametrize("name", ["gpt2", "HuggingFaceTB/SmolLM2-135M"])
def test_a_base_of_the_hub_is_named(adapter, name, tmp_path, monkeypatch):
    monkeypatch.setattr(adapter.peft_config["default"], "base_model_name_or_path", name)
    export_lora(adapter, tmp_path / "plain")
    assert ModelCard.load(tmp_path / "plain" / "README.md").data.base_model == name


@pytest.mark.parametrize("name, expected", [("me/model", "me/model"), (None, None)])
def test_the_card_of_a_merged_model(adapter, name, expected, monkeypatch):
    config = adapter.peft_config["default"]
    monkeypatch.setattr(config, "base_model_name_or_path", name)
    card = ModelCard(merged_card(config, adapter.base_model.model.lin0.weight.dtype, 0.0))
    assert card.data.base_model == expected
    assert card.data.library_name == "transformers" and card.data.tags == ["scalora"]


def test_facts_of_a_model_without_a_name(adapter, monkeypatch):
    monkeypatch.setattr(adapter.peft_config["default"], "base_model_name_or_path", None)
    assert dict(facts_of(adapter.peft_config["default"]))["base model"].startswith("unnamed")


TEMPLATE = """---
library_name: peft
---

# Model Card for Model ID

<!-- Provide a quick summary. -->

## Model Details

### Model Description

- **Developed by:** [More Information Needed]
- **License:** [More Information Needed]

## Uses

<!-- Address questions
around how the model is used. -->

### Direct Use

[More Information Needed]

## Training Details

Words of mine.

### Speeds

[More Information Needed]

### Framework versions

- PEFT 0.21.2
"""


def test_unfilled_sections_of_a_template_are_left_out_and_words_are_kept():
    card = without_empty_sections(TEMPLATE)
    assert "[More Information Needed]" not in card and "<!--" not in card
    for unfilled in ("Model Details", "Model Description", "Uses", "Direct Use", "Speeds", "Developed by"):
        assert unfilled not in card
    kept = (
        "---\nlibrary_name: peft\n---",
        "## Training Details\n\nWords of mine.\n\n### Framework versions\n\n- PEFT 0.21.2",
    )
    assert all(text in card for text in kept)
    assert without_empty_sections(card) == card


def test_a_saved_adapter_has_no_unfilled_card_and_claims_no_rank(adapter, tmp_path):
    adapter.save_pretrained(tmp_path / "saved")
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "[More Information Needed]" not in card and "far above r" not in card
    assert "library_name: peft" in card and "import peft_scalora" in card
    assert "can exceed r" in card and len(card.splitlines()) < 60
    assert "\n# ScaLoRA adapter\n" in card
    for of_the_template in ("Model ID", "Carbon emissions", "BibTeX", "Use the code below", "Contact", "Risks"):
        assert of_the_template not in card
