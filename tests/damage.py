"""Hypothesis strategies for files that were valid once: bytes and JSON with something wrong."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st


@contextmanager
def told(kind: type[Exception], *named: str) -> Iterator[None]:
    """Let pass an error of a kind whose message has these words, and no other."""
    message = None
    try:
        yield
    except kind as error:
        message = str(error)
    if message is not None:
        assert all(name in message for name in named), message
        assert len(message) < 100_000


damages = settings(
    max_examples=120,
    derandomize=True,
    database=None,
    deadline=None,
    # Each example writes its file anew into the test's folder.
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

_DEEP = "[" * 100_000
"""Deeper than a parser goes."""

ODD: st.SearchStrategy[Any] = st.one_of(
    st.sampled_from([None, True, -1, 0, 2**31, 2**70, 1.5, "", "x", "\x1b[2J", [], {}]),
    st.sampled_from([float("nan"), float("inf"), [None], {"x": None}, [[]], ["x"] * 3, "a" * 5000]),
    st.integers(-(2**63), 2**64),
    st.text(max_size=8),
    st.lists(st.integers(-3, 300), max_size=4),
)
"""What JSON may hold where something else belongs."""


@st.composite
def damaged_bytes(draw: st.DrawFn, whole: bytes) -> bytes:
    """Bytes of which some are missing, changed or added; sometimes none."""
    kind = draw(st.sampled_from(["cut", "change", "insert", "remove", "other"]))
    at = draw(st.integers(0, len(whole)))
    if kind == "cut":
        return whole[:at]
    if kind == "change":
        some = draw(st.binary(min_size=1, max_size=4))
        return whole[:at] + some + whole[at + len(some) :]
    if kind == "insert":
        return whole[:at] + draw(st.binary(min_size=1, max_size=8)) + whole[at:]
    if kind == "remove":
        return whole[:at] + whole[at + draw(st.integers(1, 64)) :]
    return draw(st.binary(max_size=200))


@st.composite
def damaged_value(draw: st.DrawFn, value: Any) -> Any:
    """A JSON value in which one place, however deep, holds something else or is missing."""
    inner = isinstance(value, dict | list) and len(value) > 0 and draw(st.integers(0, 3)) > 0
    if not inner:
        return draw(ODD)
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = draw(st.sampled_from(keys))
    copy = value.copy()
    if draw(st.integers(0, 4)) == 0:
        del copy[key]
    else:
        copy[key] = draw(damaged_value(value[key]))
    return copy


def damaged_json(value: Any) -> st.SearchStrategy[bytes]:
    """JSON in which one place holds something else, or that is damaged as bytes."""
    text = json.dumps(value).encode()
    return st.one_of(
        damaged_value(value).map(lambda other: json.dumps(other).encode()),
        damaged_bytes(text),
        st.just(_DEEP.encode()),
    )


def damaged_toml(text: str) -> st.SearchStrategy[bytes]:
    """TOML that is damaged as bytes, or nests too deep."""
    return st.one_of(
        damaged_bytes(text.encode()), st.sampled_from([b"a = " + _DEEP.encode(), b"\xff = 1"])
    )


def damaged_safetensors(whole: bytes, *fields: str) -> st.SearchStrategy[bytes]:
    """A safetensors file that is damaged as bytes, in its header, or in JSON of its metadata.

    Parameters
    ----------
    whole
        The file.
    fields
        Names of the metadata's fields that hold JSON.
    """
    (length,) = struct.unpack("<Q", whole[:8])
    header, tensors = json.loads(whole[8 : 8 + length]), whole[8 + length :]

    def with_header(changed: Any) -> bytes:
        text = json.dumps(changed).encode()
        return struct.pack("<Q", len(text)) + text + tensors

    def with_field(name: str, content: str) -> bytes:
        return with_header(header | {"__metadata__": header["__metadata__"] | {name: content}})

    return st.one_of(
        damaged_bytes(whole),
        damaged_value(header).map(with_header),
        *(
            damaged_value(json.loads(header["__metadata__"][name])).map(
                lambda value, name=name: with_field(name, json.dumps(value))
            )
            for name in fields
        ),
        *(st.just(with_field(name, _DEEP)) for name in fields),
    )
