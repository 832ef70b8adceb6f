"""Conversations as text, by the checkpoint's own chat template, and where each message is in it.

transformers runs templates in jinja's immutable sandbox: they see the messages and nothing else.
"""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from reltrace_worker.types.errors import InvalidJob, Violation
from reltrace_worker.types.jobs import Chat, Span

MAX_CHARACTERS = 1 << 22
"""Of a conversation as text: four times what a prompt may have, for what the template adds."""

# Noncharacters, which Unicode reserves for use inside a program.
_BEGIN, _END = "\ufdd0", "\ufdd1"
_MARK = re.compile(f"([{_BEGIN}{_END}])")


@dataclass(frozen=True, slots=True)
class RenderedChat:
    """A conversation as text, which ends with the beginning of the assistant's next message.

    `contents` has the characters of each message, without the white space around it; no characters
    where the template leaves it out.
    """

    text: str
    contents: tuple[Span, ...]


def render(tokenizer: Any, chat: Chat) -> RenderedChat:
    """Turn a conversation into text; InvalidJob where the template does not take it."""
    if not chat.messages:
        raise _error("are none; give at least one message with role and content")
    if not tokenizer.chat_template:
        raise _error("need a chat template, and the model has none; give a prompt")
    contents = [message.content for message in chat.messages]
    text = _apply_template(tokenizer, chat, contents)
    if len(text) > MAX_CHARACTERS:
        raise _error(f"are {len(text)} characters as text; at most {MAX_CHARACTERS} are allowed")
    stripped = [content.strip() for content in contents]
    marked = [
        content.replace(core, f"{_BEGIN}{core}{_END}", 1) if core else content
        for content, core in zip(contents, stripped, strict=True)
    ]
    spans: list[Span] = []
    if not _MARK.search(text):
        with suppress(InvalidJob):
            spans = _spans_between_marks(_apply_template(tokenizer, chat, marked), text, stripped)
    return RenderedChat(text, tuple(spans or _spans_in_order(text, stripped)))


def _spans_between_marks(marked: str, text: str, contents: list[str]) -> list[Span]:
    """Return where the contents are, by the marks around them; empty if that can not be told.

    A template may look at what a message says, and write another text if there are marks in it.
    """
    # Text and marks by turns.
    parts = _MARK.split(marked)
    in_order = [_BEGIN, _END] * sum(map(bool, contents))
    if parts[1::2] != in_order or "".join(parts[::2]) != text:
        return []
    borders = accumulate(len(part) for part in parts[::2])
    spans: list[Span] = []
    at = 0
    for content in contents:
        spans.append((next(borders), next(borders)) if content else (at, at))
        at = spans[-1][1]
    return spans


def _spans_in_order(text: str, contents: list[str]) -> list[Span]:
    """Return where the words of the contents come next, each behind those before it."""
    spans: list[Span] = []
    at = 0
    for content in contents:
        first = text.find(content, at) if content else -1
        spans.append((at, at) if first < 0 else (first, first + len(content)))
        at = spans[-1][1]
    return spans


def _apply_template(tokenizer: Any, chat: Chat, contents: list[str]) -> str:
    messages = [
        {"role": message.role, "content": content}
        for message, content in zip(chat.messages, contents, strict=True)
    ]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:
        # A template may fail in any way, or raise errors of its own.
        raise _error(f"are not what the model's chat template takes: {error}") from error
    assert isinstance(text, str)
    return text


def _error(description: str) -> InvalidJob:
    return InvalidJob([Violation("messages", description)])
