"""Cuts a corpus into slices, by the number of prompts alone, so that all builds cut alike."""

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

_FIRST_SIZE = 16
"""Prompts of the first slices: seconds of work for a small model on two cores."""


def sizes(largest: int) -> Iterator[int]:
    """Yield how many prompts each slice has, without end.

    The first slices are small, so that something is done soon; later ones are a quarter as large as
    all before them, up to `largest`, because the result of a slice of a large model is hundreds of
    megabytes, however few prompts it has.
    """
    before = 0
    while True:
        size = min(largest, max(_FIRST_SIZE, before // 4))
        yield size
        before += size


def first_prompts(count: int, largest: int) -> Array:
    """Return the first prompt of each of `count` slices, and of the next: int64 [count + 1]."""
    result: Array = np.cumsum([0, *islice(sizes(largest), count)], dtype=np.int64)
    return result


@dataclass(frozen=True, slots=True)
class Slice:
    """Consecutive prompts of a corpus: texts and conversations, from prompt number `first` on."""

    number: int
    first: int
    prompts: list[str | types_pb2.Chat]

    @property
    def digest(self) -> str:
        whole = hashlib.sha256()
        for prompt in self.prompts:
            if isinstance(prompt, str):
                data = prompt.encode()
            else:
                messages = [[message.role, message.content] for message in prompt.messages]
                # No text in UTF-8 has this byte.
                data = b"\xff" + json.dumps(messages).encode()
            whole.update(len(data).to_bytes(8, "little") + data)
        return whole.hexdigest()


def slices(prompts: Iterable[str | Mapping[str, Any]], largest: int) -> Iterator[Slice]:
    """Cut a corpus into slices; raises as `read_prompt`."""
    iterator, first = iter(prompts), 0
    for number, size in enumerate(sizes(largest)):
        values = list(islice(iterator, size))
        if not values:
            return
        fields = (f"prompts[{index}]" for index in range(first, first + size))
        yield Slice(number, first, list(map(read_prompt, values, fields)))
        first += size


def read_prompt(value: object, field: str) -> str | types_pb2.Chat:
    """Check a prompt of a corpus: a text, or a mapping with "prompt" or "messages".

    An "id" is allowed, as in items of `trace_many`, and ignored. An empty text is left to the
    worker, which skips it and says so. Raises InvalidArgument, naming `field`, if it is wrong.
    """
    allowed = "text or a mapping"
    if isinstance(value, Mapping):
        for key in value:
            if key not in ("id", "prompt", "messages"):
                raise invalid(
                    f"{field}.{key}",
                    "is no field of a prompt of an atlas; allowed: id, prompt, messages",
                )
        prompt, messages = value.get("prompt"), value.get("messages")
        if messages is not None:
            if prompt is not None:
                raise invalid(f"{field}.prompt", "excludes messages; give one of them")
            return chat_to_wire(messages, f"{field}.messages")
        if prompt is None:
            raise invalid(field, "is missing; give prompt or messages")
        value, field, allowed = prompt, f"{field}.prompt", "text"
    if not isinstance(value, str):
        raise invalid(field, f"must be {allowed}, not {type(value).__name__}")
    check_encodable(value, field)
    return value
