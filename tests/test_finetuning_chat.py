"""Conversations in all common forms: the model's template, and a loss on the assistant's turns alone."""

import datasets
import pytest
from helpers_runs import save_language_model, sentences, write_rows
from transformers import AutoTokenizer

from peft_scalora.cli import main
from peft_scalora.finetuning.data import Fields, check_rows, encode, find_fields, load_rows
from peft_scalora.finetuning.use import generate_answers

# The roles are words of the tokenizer: "the" opens a user's turn, "a" the assistant's.
PLAIN = (
    "{% for m in messages %}{{ {'user': 'the', 'assistant': 'a', 'system': 'very'}[m.role] }} {{ m.content }} [EOS] "
    "{% endfor %}{% if add_generation_prompt %}a {% endif %}"
)
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}a {% generation %}{{ m.content }} [EOS]{% endgeneration %} "
    "{% else %}the {{ m.content }} [EOS] {% endif %}{% endfor %}{% if add_generation_prompt %}a {% endif %}"
)
REWRITING = "{% for m in messages %}{{ m.role if loop.last else 'the' }} {{ m.content }} {% endfor %}"
TURNS = [("user", "red cat"), ("assistant", "sat on"), ("user", "blue"), ("assistant", "ran")]
MESSAGES = [{"role": role, "content": content} for role, content in TURNS]
SHAREGPT = [{"from": {"user": "human", "assistant": "gpt"}[role], "value": content} for role, content in TURNS]


@pytest.fixture
def tokenizer(tmp_path):
    return AutoTokenizer.from_pretrained(save_language_model(tmp_path / "model"))


def encoded(tokenizer, row, fields=None, max_length=50):
    rows = datasets.Dataset.from_list([row])
    fields = find_fields(rows.column_names, "causal-lm", fields or Fields())
    check_rows(rows, fields, "rows")
    return encode(rows, tokenizer, "causal-lm", fields, max_length)[0]


def trained(tokenizer, row):
    return tokenizer.decode([token for token in row["labels"] if token != -100])


@pytest.mark.parametrize("template", [PLAIN, MARKED])
@pytest.mark.parametrize("row", [{"messages": MESSAGES}, {"conversations": SHAREGPT}])
def test_the_assistants_turns_are_trained_on(tokenizer, row, template):
    tokenizer.chat_template = template
    found = encoded(tokenizer, row)
    assert tokenizer.decode(found["input_ids"]) == "the red cat [EOS] a sat on [EOS] the blue [EOS] a ran [EOS]"
    assert trained(tokenizer, found) == "sat on [EOS] ran [EOS]"
    kept = [token for token, label in zip(found["input_ids"], found["labels"]) if label != -100]
    assert kept == [label for label in found["labels"] if label != -100]


@pytest.mark.parametrize("completion", [MESSAGES[3:], "ran"])
def test_of_a_conversational_prompt_the_completion_is_trained_on(tokenizer, completion):
    tokenizer.chat_template = PLAIN
    found = encoded(tokenizer, {"prompt": MESSAGES[:3], "completion": completion})
    assert tokenizer.decode(found["input_ids"]).startswith("the red cat [EOS] a sat on [EOS]")
    assert trained(tokenizer, found) == "ran [EOS]"


def test_a_system_message_and_a_named_field(tokenizer):
    tokenizer.chat_template = PLAIN
    row = {"talk": [{"role": "system", "content": "not"}, *MESSAGES[:2]], "text": "mat"}
    assert trained(tokenizer, encoded(tokenizer, row, Fields(messages="talk"))) == "sat on [EOS]"


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], r"row 1: field 'messages' has \[\], not a list of messages"),
        ([{"role": "user"}], "the message 1 .* without a role or a content"),
        (MESSAGES[:1], "no message of the assistant"),
    ],
)
def test_what_is_no_conversation_is_named(tokenizer, messages, said):
    tokenizer.chat_template = PLAIN
    rows = datasets.Dataset.from_dict({"messages": [messages]})
    with pytest.raises(ValueError, match=said):
        check_rows(rows, Fields(messages="messages"), "rows")


def test_a_template_that_does_not_tell_turns_apart_is_refused(tokenizer):
    with pytest.raises(ValueError, match="the model has no chat template"):
        encoded(tokenizer, {"messages": MESSAGES})
    tokenizer.chat_template = REWRITING
    with pytest.raises(ValueError, match="writes turn 2 of 4 in another way once others follow"):
        encoded(tokenizer, {"messages": MESSAGES})
    tokenizer.chat_template = "{{ raise_exception('no system here') }}"
    with pytest.raises(ValueError, match=r"refuses the conversation .*no system here"):
        encoded(tokenizer, {"messages": MESSAGES})


def test_the_command_trains_on_conversations_evaluates_and_generates(tmp_path, capsys, monkeypatch):
    rows = [{"messages": [{"role": "user", "content": text}, *MESSAGES[1:2]]} for text in sentences(40)]
    (tmp_path / "chat.jinja").write_text(PLAIN)
    output = str(tmp_path / "run")
    arguments = ["--model", save_language_model(tmp_path / "model"), "--output", output, "--max-steps", "60"]
    arguments += ["--data", write_rows(tmp_path / "rows.jsonl", rows), "--learning-rate", "3e-2", "--task", "causal-lm"]
    arguments += ["--r", "2", "--lora-alpha", "4"]
    assert main(["finetune", *arguments]) == 1
    assert "the model has no chat template" in capsys.readouterr().err
    assert main(["finetune", *arguments, "--chat-template", str(tmp_path / "chat.jinja")]) == 0
    said = capsys.readouterr()
    assert "text of messages; 32 rows to train, 8 held out" in said.err
    assert f"peft-scalora generate {output}" in said.out
    assert list(generate_answers(output, ["red cat"], max_new_tokens=3)) == ["sat on"]
    assert main(["generate", output, "--prompt", "red cat", "--max-new-tokens", "3"]) == 0
    assert capsys.readouterr().out == "sat on\n"
    assert main(["evaluate", output, "--data", str(tmp_path / "rows.jsonl")]) == 0
    assert "eval_rows 40" in capsys.readouterr().out
    assert load_rows(str(tmp_path / "rows.jsonl")).num_rows == 40
