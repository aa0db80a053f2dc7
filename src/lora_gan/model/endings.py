"""How a response ends: the token ids that stop sampling, and the id that closes a text.

A base names its end tokens in up to four sources: the generation config, the model config, the tokenizer and the chat
template. The sources often disagree. Llama-3-Instruct and Gemma-3-it list the end of a chat turn second, and Gemma's
tokenizer names another token. So every named id stops sampling, and the kind of prompt decides which id closes a text:

    chat prompt    the id that the chat template writes after an assistant message
    plain prompt   the tokenizer's end token; without one, the first id of the generation config, then of the config

Only this module decides how a response ends. Used by sampling, score(), imitation, rewards, model cards and export.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from . import base_checks

# Placeholder messages for trial renderings. Templates neither trim nor escape these words.
USER, ANSWER = "Xquestionx", "Xanswerx"
#: Options of apply_chat_template that trial renderings set themselves.
CALL_OPTIONS = ("add_generation_prompt", "continue_final_message", "tokenize", "return_dict", "return_tensors", "tools")


@dataclass(frozen=True)
class Endings:
    """The ids that end a response on one base.

    Attributes:
        stop_ids: every id that stops sampling; the first closes a response to a plain prompt.
    """

    tokenizer: PreTrainedTokenizerBase
    stop_ids: tuple[int, ...]
    _closing: dict[str, int | None] = field(default_factory=dict, init=False, repr=False, compare=False)
    _tails: dict[str, tuple[str, bool]] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def of(
        cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, template_options: Mapping[str, Any] | None
    ) -> Endings:
        """Collect the ids of a base.

        Args:
            template_options: the run's chat_template_kwargs, which may include a chat template.

        Raises:
            ValueError: no source names an end token.
        """
        rows = base_checks.embedding_rows(model)
        config = model.config
        named = [
            *ids_of(tokenizer.eos_token_id),
            *ids_of(getattr(model.generation_config, "eos_token_id", None)),
            *ids_of(config.get_text_config().eos_token_id),
            *ids_of(getattr(config, "eos_token_id", None)),
        ]
        known = tuple(dict.fromkeys(id for id in named if 0 <= id < rows))  # an id without a row cannot be sampled
        from_config = cls(tokenizer, known)
        chat = [from_config.written_after_answers(options) for options in _templates(tokenizer, template_options or {})]
        stop_ids = tuple(dict.fromkeys([*known, *(id for id in chat if id is not None and 0 <= id < rows)]))
        if not stop_ids:
            outside = f" with a row in its embedding (it names {named})" if named else ""
            raise ValueError(
                f"the base names no end-of-text token{outside}, so no response could end: set "
                "tokenizer.eos_token or model.generation_config.eos_token_id"
            )
        return cls(tokenizer, stop_ids)

    @property
    def text_id(self) -> int:
        """The id that closes a response to a plain prompt."""
        return self.stop_ids[0]

    def chat_id(self, options: Mapping[str, Any]) -> int:
        """The id that closes a response to chat messages, if they are rendered with these template options.

        Raises:
            ValueError: the options include a template that closes messages with an id that does not stop sampling.
        """
        id = self.written_after_answers(options)
        if id is not None and id not in self.stop_ids:
            token = self.tokenizer.convert_ids_to_tokens(id)
            raise ValueError(
                f"this row's chat template closes a message with {token!r}, which does not stop sampling in this run: "
                "give the template in the setting chat_template_kwargs"
            )
        return self.text_id if id is None else id

    def written_after_answers(self, options: Mapping[str, Any]) -> int | None:
        """The id of the end token that the chat template writes after an assistant message; None without one."""
        template = _resolved(self.tokenizer, options)
        if template is None:
            return None
        if template not in self._closing:
            self._closing[template] = self._find_closing({**options, "chat_template": template})
        return self._closing[template]

    def is_rendered(self, text: str, options: Mapping[str, Any]) -> bool:
        """Whether a plain prompt is text that a chat template has rendered."""
        tails = {self._tail(options), self._tail({})} - {("", False)}
        # A tail with a special token may also be in the middle of the text: a prefix of the response follows.
        return any(text.rstrip().endswith(tail) or (is_special and tail in text) for tail, is_special in tails)

    def _find_closing(self, options: Mapping[str, Any]) -> int | None:
        question, answer = {"role": "user", "content": USER}, {"role": "assistant", "content": ANSWER}
        written = self._render([question, answer], options)
        found = None if written is None else self._first_end(written.rpartition(ANSWER)[2])
        if found is None:
            # Some templates, such as GLM's, close a message with the opening of the next message.
            written = self._render([question, answer, {"role": "user", "content": USER}], options)
            between = "" if written is None else written.rpartition(ANSWER)[2].partition(USER)[0]
            found = self._first_end(between)
            found = found if found in self.stop_ids else None
        return found

    def _first_end(self, text: str) -> int | None:
        """The id of the first special token in a text, else of the added token at its start; None without either."""
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        special, added = base_checks.special_tokens(self.tokenizer), base_checks.added_tokens(self.tokenizer)
        begins = (id for id, token in added.items() if text.strip().startswith(token.content))
        return next(chain((id for id in ids if id in special), begins), None)

    def _tail(self, options: Mapping[str, Any]) -> tuple[str, bool]:
        """The text that the template writes between a user's last message and the response, stripped; and whether the
        text contains a special token.

        Added tokens with the flag `special` count, too: Gemma's <end_of_turn> has no role in the tokenizer.
        """
        template = _resolved(self.tokenizer, options)
        if template is None:
            return "", False
        key = template + repr(sorted((name, repr(value)) for name, value in options.items()))
        if key not in self._tails:
            written = self._render([{"role": "user", "content": USER}], options, add_generation_prompt=True)
            tail = "" if written is None else written.rpartition(USER)[2].strip()
            tail = tail if len(tail) >= 5 else ""  # a short tail such as ":" occurs in any text
            special = base_checks.special_tokens(self.tokenizer).values()
            self._tails[key] = tail, any(token in tail for token in special)
        return self._tails[key]

    def _render(
        self, messages: list[dict[str, str]], options: Mapping[str, Any], *, add_generation_prompt: bool = False
    ) -> str | None:
        """The rendered messages; None if the template rejects them."""
        options = {name: value for name, value in options.items() if name not in CALL_OPTIONS}
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=add_generation_prompt, **options
                )
            )
        except Exception:  # a template may raise anything; rows that need it report the template's own message
            return None


def ids_of(value: int | Iterable[int] | None) -> list[int]:
    """A list of the ids in a config's value: None, one id, or several ids."""
    if value is None:
        return []
    return [value] if isinstance(value, int) else [int(id) for id in value]


def _templates(tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Options for each chat template of a run: the selected template, and the tokenizer's named templates."""
    named = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
    return [options, *({**options, "chat_template": name} for name in named)]


def _resolved(tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]) -> str | None:
    """The chat template that these options select; None without one."""
    try:
        return tokenizer.get_chat_template(options.get("chat_template"), options.get("tools"))
    except ValueError:
        return None
