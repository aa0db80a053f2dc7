"""Encodes prompts, responses and targets as token ids, and decodes token ids to text.

Sampling produces ids. Callers that start from text (score(), imitation, rewards that use the base) must get the ids
that sampling would have produced: the same prompt and the same end. `endings` decides how a response ends. This module
does the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from ..config import Config
from ..data import Conversation, Row, RowError, as_user_message, excerpt, is_conversation
from .base import Base

#: Remedies for a prompt that is too long, by the setting on_long_prompt.
REMEDIES = {
    "raise": "set a smaller max_completion_length, or set on_long_prompt to drop or truncate_left",
    "drop": "set a smaller max_completion_length, or set on_long_prompt to truncate_left",
    "truncate_left": "or set a smaller max_completion_length",
}


class Encoder:
    """Encodes texts and chat messages as token ids for one base, and decodes sampled ids.

    Args:
        base: gives the tokenizer, the chat template and the context.
        config: gives chat_template_kwargs, skip_special_tokens, max_completion_length and on_long_prompt.
    """

    def __init__(self, base: Base, config: Config) -> None:
        self.base, self.config = base, config

    # --- prompts

    def prompts(self, rows: Sequence[Row], max_new_tokens: int | None = None) -> list[list[int]]:
        """Token ids of each row's prompt.

        A text starts as the tokenizer starts texts, for example with a begin-of-text token. Chat messages are rendered
        by the chat template.

        Args:
            max_new_tokens: tokens reserved for the response; None means max_completion_length.

        Raises:
            ValueError: a prompt has no tokens, the template rejects it, or it is too long for the base's context and
                `on_long_prompt` does not cut it.
        """
        return [self.prompt(row, max_new_tokens) for row in rows]

    def prompt(self, row: Row, max_new_tokens: int | None = None) -> list[int]:
        """Token ids of one row's prompt; see `prompts`."""
        length = self.config.max_completion_length if max_new_tokens is None else max_new_tokens
        if isinstance(row.prompt, str):
            ids = self._text_ids(row)
        else:
            ids = self._template_ids(row, row.prompt, self._options(row))
            if not ids:
                raise RowError(
                    row,
                    f"the base's chat template makes no tokens of the prompt {excerpt(row.prompt)}: give messages "
                    "with text",
                )
        limit = self.base.context - length
        if len(ids) <= limit:
            return ids
        if self.config.on_long_prompt == "truncate_left" and limit > 1:
            bos = ids[:1] if ids[0] == self.base.tokenizer.bos_token_id else []
            return bos + ids[len(ids) - limit + len(bos) :]
        raise TooLong(
            row,
            f"a prompt of {len(ids)} tokens and a response of up to {length} do not fit into this base's "
            f"{self.base.context} tokens: shorten the prompt {excerpt(row.prompt)}, "
            f"{REMEDIES[self.config.on_long_prompt]}",
        )

    def _text_ids(self, row: Row) -> list[int]:
        tokenizer, text = self.base.tokenizer, str(row.prompt)
        bare = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        if not bare:
            raise RowError(row, f"the prompt {text!r} has no tokens: give a prompt with at least one token")
        ids = list(tokenizer(text, verbose=False)["input_ids"])
        before, after = self._frame
        if before and bare[: len(before)] == before and ids[: 2 * len(before)] == before * 2:
            ids = ids[len(before) :]  # the text has a begin-of-text token already, written by a template
        if after and ids[-len(after) :] == after and set(after) <= set(self.base.eos_ids):
            ids = ids[: -len(after)]  # this tokenizer adds an end token to every text; the response must come before it
        return ids

    @cached_property
    def _frame(self) -> tuple[list[int], list[int]]:
        """The ids that the tokenizer puts before and after every text."""
        tokenizer = self.base.tokenizer
        bare, framed = (list(tokenizer("a", add_special_tokens=special)["input_ids"]) for special in (False, True))
        for start in range(len(framed) - len(bare) + 1):
            if framed[start : start + len(bare)] == bare:
                return framed[:start], framed[start + len(bare) :]
        return [], []

    def _options(self, row: Row) -> dict[str, Any]:
        """Options of the chat template for one row. The row's own options override the run's."""
        return {**(self.config.chat_template_kwargs or {}), **row.template_options}

    def _template_ids(self, row: Row, messages: Conversation, options: Mapping[str, Any]) -> list[int]:
        """Token ids of chat messages. As in TRL, a response continues a last message by the assistant."""
        if self.base.tokenizer.chat_template is None and "chat_template" not in options:
            raise RowError(
                row,
                f"the base {self.base.name or 'in memory'!r} has no chat template, but the prompt is chat messages: "
                "give the prompts as plain text, or give as processing_class= a tokenizer with a chat template "
                "(tokenizer.chat_template)",
            )
        continues = messages[-1]["role"] == "assistant"
        options = {"add_generation_prompt": not continues, "continue_final_message": continues, **options}
        fixed = {"tokenize": True, "return_dict": True, "return_tensors": None, "tokenizer_kwargs": {"verbose": False}}
        try:
            rendered: Any = self.base.tokenizer.apply_chat_template(messages, **(options | fixed))
            return list(rendered["input_ids"])
        except ImportError:  # jinja2 is missing: not a problem of the row
            raise
        except Exception as error:  # a template may raise anything
            raise RowError(row, f"the base's chat template rejects the prompt {excerpt(messages)}: {error}") from error

    # --- chat

    @property
    def has_template(self) -> bool:
        """Whether chat messages can be rendered."""
        return self.base.tokenizer.chat_template is not None or "chat_template" in (
            self.config.chat_template_kwargs or {}
        )

    def is_chat(self, row: Row) -> bool:
        """Whether a row's prompt is chat messages, or a text that a chat template has rendered."""
        return is_conversation(row.prompt) or self.base.endings.is_rendered(str(row.prompt), self._options(row))

    def as_chat(self, rows: Sequence[Row]) -> list[Row]:
        """The rows with plain prompts as user messages. Prompts that a template has rendered already stay unchanged.

        Raises:
            ValueError: the base has no chat template.
        """
        if not self.has_template:
            raise ValueError(
                f"apply_chat_template=True needs a chat template, but the base {self.base.name or 'in memory'!r} has "
                "none: drop the setting, or give as processing_class= a tokenizer with a chat template"
            )
        return [row if self.is_chat(row) else as_user_message(row) for row in rows]

    def closing_id(self, row: Row) -> int:
        """The id that closes a response to this row."""
        return self.base.endings.chat_id(self._options(row)) if self.is_chat(row) else self.base.endings.text_id

    # --- responses

    def response(self, text: str, row: Row) -> list[int]:
        """Token ids of a response text, with the closing id at the end."""
        ids, closing = list(self.base.tokenizer(text, add_special_tokens=False)["input_ids"]), self.closing_id(row)
        return ids if ids[-1:] == [closing] else [*ids, closing]

    def pairs(self, rows: Sequence[Row], responses: Sequence[str]) -> tuple[list[list[int]], list[list[int]]]:
        """Token ids of prompts and of one response per prompt. The closing id is left out if it exceeds the context.

        Raises:
            ValueError: as `prompts`; or prompt and response together exceed the base's context.
        """
        encoded = [self.response(text, row) for text, row in zip(responses, rows, strict=True)]
        if self.config.on_long_prompt == "truncate_left":
            # Prompts must be cut as in training. A response of max_completion_length tokens has no closing id there,
            # because sampling stopped before an end.
            least = self.config.max_completion_length
            prompts = [self.prompt(row, max(least, len(ids) - 1)) for row, ids in zip(rows, encoded, strict=True)]
        else:
            prompts = self.prompts(rows, 0)
        for row, prompt, response in zip(rows, prompts, encoded, strict=True):
            limit = self.base.context - len(prompt)
            if len(response) > limit + 1:
                raise RowError(
                    row,
                    f"a prompt of {len(prompt)} tokens and a response of {len(response) - 1} do not fit into this "
                    f"base's {self.base.context} tokens: shorten the prompt or the response",
                )
            del response[limit:]  # a sampled response may fill the context without an end
        return prompts, encoded

    def target(self, row: Row) -> list[int]:
        """Token ids of a row's target as the answer to its prompt, at most max_completion_length.

        For chat prompts the template renders prompt and target together. The answer is the text after the prompt, up to
        the closing id. Some templates render the prompt differently when an answer follows. Then the answer is the
        target's text and the closing id.
        """
        ids = self._rendered_target(row, row.prompt) if is_conversation(row.prompt) else None
        if ids is None:
            ids = self.response(row.target or "", row)
        return ids[: self.config.max_completion_length]

    def _rendered_target(self, row: Row, prompt: Conversation) -> list[int] | None:
        """The target's ids in the rendered conversation; None if they cannot be separated from the prompt's ids."""
        answer = row.target_messages or [{"role": "assistant", "content": row.target or ""}]
        whole = [*prompt, *answer]
        if prompt[-1]["role"] == "assistant":  # the answer continues the prompt's last message
            if row.target_messages or not isinstance(prompt[-1].get("content"), str):
                return None
            whole = [*prompt[:-1], prompt[-1] | {"content": prompt[-1]["content"] + (row.target or "")}]
        options = self._options(row)
        before = self._template_ids(row, prompt, options)
        both = self._template_ids(
            row, whole, {**options, "add_generation_prompt": False, "continue_final_message": False}
        )
        ids, closing = both[len(before) :], self.closing_id(row)
        if both[: len(before)] != before or not ids:
            return None
        last = next((index for index in reversed(range(len(ids))) if ids[index] == closing), None)
        return [*ids, closing] if last is None else ids[: last + 1]

    def decode(self, ids: Sequence[int]) -> str:
        """A response's text, without the stop id at its end. Special tokens are left out if skip_special_tokens."""
        ids = list(ids[:-1]) if len(ids) and ids[-1] in self.base.eos_ids else list(ids)
        return str(
            self.base.tokenizer.decode(self.base.words(ids), skip_special_tokens=self.config.skip_special_tokens)
        )


class TooLong(RowError):
    """A prompt is too long: prompt and response exceed the base's context."""
