"""Where a corpus is cut into slices: by the number of prompts alone, so that all runs cut alike."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from reltrace_proto.v1 import types_pb2

from reltrace.types.arrays import Array
from reltrace.types.checks import check_encodable
from reltrace.types.errors import invalid
from reltrace.types.prompt import chat_to_wire

_FIRST = 16
"""Prompts of the first slices: on a small model on two cores, some seconds."""


def sizes(most: int) -> Iterator[int]:
    """Yield how many prompts each slice has, without end.

    The first ones are small, so that something is done soon; later ones are a quarter as large as
    all before them, up to `most`: a large model's slice is hundreds of megabytes, however few
    prompts it has.
    """
    before = 0
    while True:
        size = min(most, max(_FIRST, before // 4))
        yield size
        before += size


def firsts(count: int, most: int) -> Array:
    """Return the number of the first prompt of each of so many slices, and of the one that follows.

    Returns
    -------
    ndarray
        int64 [count + 1].
    """
    result: Array = np.cumsum([0, *islice(sizes(most), count)], dtype=np.int64)
    return result


@dataclass(frozen=True, slots=True)
class Slice:
    """Some prompts of a corpus, one after the other.

    Attributes
    ----------
    number, first : int
        Which, and the number of its first prompt.
    prompts : list of str or types_pb2.Chat
        Texts and conversations, as many as the slice has; of the last, perhaps fewer.
    """

    number: int
    first: int
    prompts: list[str | types_pb2.Chat]

    @property
    def digest(self) -> str:
        """What tells its prompts from others."""
        whole = hashlib.sha256()
        for prompt in self.prompts:
            data = prompt.encode() if isinstance(prompt, str) else _chat_bytes(prompt)
            whole.update(len(data).to_bytes(8, "little") + data)
        return whole.hexdigest()


def _chat_bytes(chat: types_pb2.Chat) -> bytes:
    """Return what tells a conversation from all others, and from all texts."""
    messages = [[message.role, message.content] for message in chat.messages]
    # No text in UTF-8 has this byte.
    return b"\xff" + json.dumps(messages).encode()


def slices(prompts: Iterable[str | Mapping[str, Any]], most: int) -> Iterator[Slice]:
    """Cut a corpus into slices of so many prompts at most.

    Raises
    ------
    InvalidArgument
        Where something is no prompt. See `read_prompt`.
    """
    iterator, first = iter(prompts), 0
    for number, size in enumerate(sizes(most)):
        some = list(islice(iterator, size))
        if not some:
            return
        fields = (f"prompts[{index}]" for index in range(first, first + size))
        yield Slice(number, first, list(map(read_prompt, some, fields)))
        first += size


def read_prompt(given: object, field: str) -> str | types_pb2.Chat:
    """Check a prompt of a corpus: a text, or a mapping with "prompt" or "messages".

    An "id" is allowed, for these are items of `trace_many`; an atlas knows prompts by their
    places. An empty text is left to the worker, who leaves it out and says so.

    Parameters
    ----------
    given : object
        As the caller has it.
    field : str
        What errors name.

    Raises
    ------
    InvalidArgument
        Naming the field and what is allowed.
    """
    allowed = "text or a mapping"
    if isinstance(given, Mapping):
        for key in given:
            if key not in ("id", "prompt", "messages"):
                raise invalid(
                    f"{field}.{key}",
                    "is no field of a prompt of an atlas; allowed: id, prompt, messages",
                )
        prompt, messages = given.get("prompt"), given.get("messages")
        if messages is not None:
            if prompt is not None:
                raise invalid(f"{field}.prompt", "excludes messages; give one of them")
            return chat_to_wire(messages, f"{field}.messages")
        if prompt is None:
            raise invalid(field, "is missing; give prompt or messages")
        given, field, allowed = prompt, f"{field}.prompt", "text"
    if not isinstance(given, str):
        raise invalid(field, f"must be {allowed}, not {type(given).__name__}")
    check_encodable(given, field)
    return given
