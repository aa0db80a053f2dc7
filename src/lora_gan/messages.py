"""Text of prompts and completions, which may be chat messages, {"role", "content"}."""

from collections.abc import Mapping
from typing import Any


def completion_text(completion: Any) -> str:
    """The text of a completion. The contents of chat messages are joined by newlines."""
    if isinstance(completion, str):
        return completion
    return "\n".join(_content(message.get("content")) for message in completion)


def as_text(value: Any) -> str:
    """A prompt or completion as one text. A single chat message becomes its content, several get their roles as labels.

    Content items ({"type": "text", "text": ...}) are joined. Items without text become their type, such as "[image]".

    Raises:
        ValueError: neither a text nor a list of messages.
    """
    if isinstance(value, str):
        return value
    if not isinstance(value, list | tuple) or not all(isinstance(message, Mapping) for message in value):
        raise ValueError(f"{value!r:.80} is neither a text nor a list of chat messages {{'role': ..., 'content': ...}}")
    contents = [_content(message.get("content")) for message in value]
    if len(value) == 1:
        return contents[0]
    return "\n\n".join(
        f"{message.get('role', '?')}: {content}" for message, content in zip(value, contents, strict=True)
    )


def _content(content: Any) -> str:
    if isinstance(content, list | tuple):
        return "".join(str(item["text"]) if "text" in item else f"[{item.get('type', 'unknown')}]" for item in content)
    return "" if content is None else str(content)
