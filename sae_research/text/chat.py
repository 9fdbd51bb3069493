"""What a row of a data set holds beside text: token ids, or a conversation that the tokenizer's chat template makes text of.

Which characters of that text are a message's content is found by putting another content in its place: what stays the same
before and after it is the template's. This asks nothing of the template (few mark generated text, some trim content).
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from sae_research.runtime.errors import UserError
from sae_research.text.local import as_text, listed

DATE = datetime(2025, 1, 1)
"""Today, to templates that name it: the same text every day."""
_DATE_CALL = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")
_SAME_DATE = "{% macro strftime_now(format) %}{{ dates[format] }}{% endmacro %}\n"
"""In place of the function that transformers gives to templates (its sandbox lets no other in)."""
SYSTEM = "system"
_MARK = "5d41402abc4b2a76b9719d911017c592"

Ranges = tuple[tuple[int, int], ...]
"""Starts and ends of parts of a text, in characters, in order and apart."""


class Content(NamedTuple):
    """What a row gives."""

    text: str
    said: str | None = None
    """What tells a conversation from others: its messages but those of the system. None for a text."""
    counted: Ranges | None = None
    """Where the messages of the roles asked for stand in `text`; None where all of it counts."""
    roles: frozenset[str] = frozenset()
    """Whose messages there are."""

    @property
    def compared(self) -> str:
        """What decides its split, and is held against others to find copies."""
        return self.text if self.said is None else self.said


class Reader:
    """Makes text of rows as a tokenizer understands them. roles: whose messages count, None for all of the text."""

    def __init__(self, tokenizer: Any, roles: Collection[str] | None = None) -> None:
        self.tokenizer, self.roles = tokenizer, roles

    def read(self, value: Any, where: str) -> Content:
        """What a cell holds: text, token ids or messages. Raises `UserError` that begins with `where` for anything else,
        and for what the tokenizer or its template refuses."""
        if _is_ids(value):
            try:
                content = Content(self.decode(value))
            except (IndexError, OverflowError, ValueError) as error:
                raise UserError(
                    f"{where} holds token ids that are not this model's ({error}); name a column of text, or "
                    "a data set that was tokenised for it"
                ) from None
        elif isinstance(value, list):
            return self.conversation(_messages(value, where), where)
        else:
            content = Content(as_text(value, where))
        if self.roles is not None:
            kind = "text" if isinstance(value, str) else "token ids"
            raise UserError(
                f"{where} holds {kind}, and text.roles is for conversations: name a column of messages "
                '([{"role": ..., "content": ...}, ...]), or set text.roles: null'
            )
        return content

    def decode(self, ids: list[int]) -> str:
        """The text of a tokenised row; separators and other special tokens are left out."""
        size = len(self.tokenizer)
        if ids and not (min(ids) >= 0 and max(ids) < size):
            raise ValueError(f"ids {min(ids)} to {max(ids)}, the vocabulary has {size}")
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def conversation(self, messages: list[dict[str, Any]], where: str) -> Content:
        """A conversation by the chat template, with the ranges of the messages whose `roles` count."""
        roles = frozenset(message["role"] for message in messages)
        if not messages:
            return Content("", "", None if self.roles is None else (), roles)
        text = render(self.tokenizer, messages, where)
        counted = None if self.roles is None else self._ranges(messages, text, where)
        return Content(text, said(messages), counted, roles)

    def _ranges(self, messages: list[dict[str, Any]], text: str, where: str) -> Ranges:
        found: list[tuple[int, int]] = []
        mark = _MARK
        while mark in text:
            mark += "x"
        for i, message in enumerate(messages):
            if message["role"] not in (self.roles or ()):
                continue
            other = render(self.tokenizer, [*messages[:i], {**message, "content": mark}, *messages[i + 1 :]], where)
            before, marked, after = other.partition(mark)
            if not marked:  # the template leaves this message out
                continue
            start, end = len(os.path.commonprefix([before, text])), len(text) - len(after)
            if not text.endswith(after) or end < start or (found and start < found[-1][1]):
                raise UserError(
                    f"{where}: the chat template writes other messages anew when message {i + 1} changes, so that its "
                    "tokens cannot be told apart; set text.roles: null"
                )
            if start < end:
                found.append((start, end))
        return tuple(found)


class ContentsOnly(Reader):
    """Reads conversations without a template, for what only compares them; remembers whether it read token ids."""

    decoded = False

    def decode(self, ids: list[int]) -> str:
        self.decoded = True
        return super().decode(ids)

    def conversation(self, messages: list[dict[str, Any]], where: str) -> Content:
        return Content(said(messages), said(messages))


def said(messages: Sequence[Mapping[str, Any]]) -> str:
    """The messages' contents one after another. A system's prompt is left out where there is more: many conversations
    share it."""
    own = [message["content"] for message in messages if message["role"] != SYSTEM]
    return "\n".join(own or [message["content"] for message in messages])


def render(tokenizer: Any, messages: list[dict[str, Any]], where: str) -> str:
    """The messages as one text. Raises `UserError` where the tokenizer has no template or the template refuses them."""
    from jinja2 import TemplateError

    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            f"{where} holds messages, and this model's tokenizer has no chat template: name a chat model, or a column of "
            "text"
        )
    try:
        template = tokenizer.get_chat_template()
        dates = {found: DATE.strftime(found) for _, found in _DATE_CALL.findall(template)}
        return tokenizer.apply_chat_template(
            messages,
            chat_template=_SAME_DATE + template if dates else template,
            tokenize=False,
            date_string=DATE.strftime("%d %b %Y"),
            dates=dates,
        )
    except (TemplateError, TypeError, ValueError) as error:
        raise UserError(
            f"{where}: the chat template refuses the messages of {listed(message['role'] for message in messages)}: "
            f"{' '.join(str(error).split())[:200]}"
        ) from None


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(token, int) for token in value)


def _messages(value: list[Any], where: str) -> list[dict[str, Any]]:
    """The messages, keys without a value left out. Raises `UserError` for what is none."""
    found = []
    for message in value:
        given = {key: part for key, part in message.items() if part is not None} if isinstance(message, dict) else {}
        if not isinstance(given.get("role"), str) or not isinstance(given.get("content"), str):
            raise UserError(
                f"{where} holds {listed([repr(message)])}, which is no message: each is an object with a role and a "
                "content, both text"
            )
        as_text(given["content"], where)
        found.append(given)
    return found
