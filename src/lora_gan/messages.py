"""Prompts and completions may be chat messages, {"role", "content"}: what they say, as text."""

from collections.abc import Mapping
from typing import Any


def completion_text(completion: Any) -> str:
    """The text of a completion that is text, or chat messages: what they say, joined by newlines."""
    if isinstance(completion, str):
        return completion
    return "\n".join(_content(message.get("content")) for message in completion)


def as_text(value: Any) -> str:
    """A prompt or completion as one text: a text as it is, one chat message as its content, more with their roles.

    Content in parts ({"type": "text", "text": ...}) is joined; parts that are no text are named.
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
        return "".join(str(part["text"]) if "text" in part else f"[{part.get('type', 'unknown')}]" for part in content)
    return "" if content is None else str(content)
