"""Conversations to token ids by the model's chat template, and which of them are the assistant's."""

from __future__ import annotations

from jinja2 import TemplateError

_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant"}


def as_message(entry: dict) -> dict:
    """Return a message with role and content; ShareGPT has `from` and `value` in their places."""
    entry = {name: value for name, value in entry.items() if value is not None}
    if "from" in entry and "value" in entry:
        entry = {"role": _ROLES.get(entry["from"], entry["from"]), "content": entry["value"]}
    return entry


def check_messages(value, place: str, answered: bool = True) -> None:
    """Refuse what is no conversation, and one without a turn of the assistant where one is to be learned.

    Raises:
        ValueError: names the place and what is wrong there.
    """
    if not isinstance(value, list) or not value:
        raise ValueError(f"{place} has {value!r}, not a list of messages. Remove the row, or name another field.")
    for turn, entry in enumerate(value, start=1):
        message = as_message(entry) if isinstance(entry, dict) else {}
        if not isinstance(message.get("role"), str) or not (message.get("content") or message.get("tool_calls")):
            raise ValueError(f"{place} has the message {turn} {entry!r}, without a role or a content. Mend the row.")
    if answered and not any(as_message(entry)["role"] == "assistant" for entry in value):
        raise ValueError(f"{place} has no message of the assistant, so there is nothing to learn. Remove the row.")


def messages_of(row: dict, messages: str, prompt: str, completion: str) -> list[dict] | None:
    """Return the conversation of a row; None where its prompt and completion are text."""
    if messages:
        return [as_message(entry) for entry in row[messages]]
    if completion and isinstance(row[prompt], list):
        answer = row[completion]
        answers = answer if isinstance(answer, list) else [{"role": "assistant", "content": str(answer)}]
        return [as_message(entry) for entry in (*row[prompt], *answers)]
    return None


def tokenize_chat(messages: list[dict], tokenizer, first: int = 0) -> tuple[list[int], list[bool]]:
    """Return the token ids of a conversation, and for each whether it is of an assistant's turn.

    A template that marks what the assistant generates is taken at its word. For others, a turn is what the conversation
    has more with it than with the prompt for it.

    Args:
        first: the turn from which on the assistant's are meant.

    Raises:
        ValueError: there is no template, or it writes a turn in another way once others follow.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            "the data are conversations, but the model has no chat template: choose a model that was trained on "
            "conversations, or give a template with --chat-template."
        )
    try:
        return _tokenize_by_template(messages, tokenizer, first)
    except TemplateError as error:
        raise ValueError(f"the chat template refuses the conversation {messages}: {error}") from error


def _tokenize_by_template(messages: list[dict], tokenizer, first: int) -> tuple[list[int], list[bool]]:
    if "{% generation" in tokenizer.chat_template.replace("{%-", "{%") and first == 0:
        encoded = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return encoded["input_ids"], [bool(mark) for mark in encoded["assistant_masks"]]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    answers = [turn for turn in range(first, len(messages)) if messages[turn]["role"] == "assistant"]
    spans = [_span(messages, turn, text, tokenizer) for turn in answers]
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    trained = [any(start <= begin < end for start, end in spans) for begin, _ in encoded["offset_mapping"]]
    return encoded["input_ids"], trained


def _span(messages: list[dict], turn: int, text: str, tokenizer) -> tuple[int, int]:
    """Return where in the text of the conversation the turn begins and ends."""
    before = tokenizer.apply_chat_template(messages[:turn], tokenize=False, add_generation_prompt=True)
    after = tokenizer.apply_chat_template(messages[: turn + 1], tokenize=False)
    if not after.startswith(before) or not text.startswith(after):
        raise ValueError(
            f"the chat template writes turn {turn + 1} of {len(messages)} in another way once others follow, so it "
            "does not tell what to learn: give one that marks the assistant's text with {% generation %} by "
            "--chat-template, or rows with one answer each as prompt and completion."
        )
    return len(before), len(after)
