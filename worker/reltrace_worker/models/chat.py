"""Conversations as text, by the checkpoint's own chat template, and where each turn is in it.

transformers runs templates in jinja's immutable sandbox: they see the messages and nothing else.
"""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from reltrace_worker.types.errors import InvalidJob, Violation
from reltrace_worker.types.jobs import Chat, Span

MOST_CHARACTERS = 1 << 22
"""Of a conversation as text: four times what a prompt may have, for the template's marks."""

# Noncharacters: Unicode keeps them for such a use, inside of a program.
_BEGIN, _END, _MARKS = "\ufdd0", "\ufdd1", "\ufdd0\ufdd1"


@dataclass(frozen=True, slots=True)
class RenderedChat:
    """A conversation as text.

    Parameters
    ----------
    text
        With the beginning of the assistant's next turn at its end.
    contents
        Of each message: the characters of its content, without the white space around it; none
        where the template leaves it out.
    """

    text: str
    contents: tuple[Span, ...]


def render(tokenizer: Any, chat: Chat) -> RenderedChat:
    """Turn a conversation into text.

    Raises
    ------
    InvalidJob
        There is no template, or it does not take these messages.
    """
    if not chat.messages:
        raise _fault("are none; give at least one message with role and content")
    if not tokenizer.chat_template:
        raise _fault("need a chat template, and the model has none; give a prompt")
    contents = [message.content for message in chat.messages]
    text = _rendered(tokenizer, chat, contents)
    if len(text) > MOST_CHARACTERS:
        raise _fault(f"are {len(text)} characters as text; at most {MOST_CHARACTERS} are allowed")
    cores = [content.strip() for content in contents]
    marked = [
        content.replace(core, f"{_BEGIN}{core}{_END}", 1) if core else content
        for content, core in zip(contents, cores, strict=True)
    ]
    spans: list[Span | None] = [None] * len(cores)
    if not any(mark in text for mark in _MARKS):
        with suppress(InvalidJob):
            spans = _between_marks(_rendered(tokenizer, chat, marked), text, cores)
    found: list[Span] = []
    at = 0
    for core, span in zip(cores, spans, strict=True):
        if span is None:
            # A template may look at what a message says: then where its words come next.
            first = text.find(core, at) if core else -1
            span = (at, at) if first < 0 else (first, first + len(core))
        found.append(span)
        at = max(at, span[1])
    return RenderedChat(text, tuple(found))


def _between_marks(marked: str, text: str, cores: list[str]) -> list[Span | None]:
    """Return where the marked contents are, if the text is the same without marks."""
    spans: list[Span | None] = [None] * len(cores)
    places = [index for index, core in enumerate(cores) if core]
    parts = re.split(f"[{_MARKS}]", marked)
    # By the order of the messages, each of which has its two marks once.
    ordered = "".join(re.findall(f"[{_MARKS}]", marked)) == _MARKS * len(places)
    if ordered and "".join(parts) == text:
        at = 0
        for number, part in enumerate(parts):
            if number % 2:
                spans[places[number // 2]] = at, at + len(part)
            at += len(part)
    return spans


def _rendered(tokenizer: Any, chat: Chat, contents: list[str]) -> str:
    messages = [
        {"role": message.role, "content": content}
        for message, content in zip(chat.messages, contents, strict=True)
    ]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:
        # Whatever a template does, raising errors of its own included.
        raise _fault(f"are not what the model's chat template takes: {error}") from error
    assert isinstance(text, str)
    return text


def _fault(description: str) -> InvalidJob:
    return InvalidJob([Violation("messages", description)])
