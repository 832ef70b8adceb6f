"""Targets and their translation to the wire."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from reltrace_proto.v1 import types_pb2

from reltrace.types.checks import check_text, flag, whole_number
from reltrace.types.errors import InvalidArgument, invalid

_MAX_ID = 2**32 - 1


@dataclass(frozen=True, slots=True)
class Target:
    """The scalar that a trace explains; the backward pass starts at it with gradient 1.

    Parameters
    ----------
    token : str or int, default "max"
        The token whose logit is traced: "max" for the one with the largest logit, a text
        that the model's tokenizer encodes as exactly one token, or a token id. (A token
        whose text is literally "max" is given by its id.)
    position : int, default -1
        Index of the prompt token whose next-token logits are read, from the end if negative.
    contrast : str or int, optional
        Subtract this token's logit.
    continuation : str or sequence of int, optional
        Response tokens that follow the prompt: trace their summed logits. Excludes
        `token`, `position` and `contrast`.
    logprob : bool, default False
        Trace the log-probability instead of the logit.
    each : bool, default False
        With `continuation`: one trace per response token instead of one of their sum. The
        result is then a list of traces.

    Raises
    ------
    InvalidArgument
        If a field has the wrong type or range, or fields exclude each other.
    """

    token: str | int = "max"
    position: int = -1
    contrast: str | int | None = None
    continuation: str | Sequence[int] | None = None
    logprob: bool = False
    each: bool = False

    def __post_init__(self) -> None:
        _set(self, "token", _token(self.token, "token"))
        if self.contrast is not None:
            _set(self, "contrast", _token(self.contrast, "contrast"))
        _set(self, "position", whole_number(self.position, "position", -(2**31), 2**31 - 1))
        flag(self.logprob, "logprob")
        if flag(self.each, "each") and self.continuation is None:
            raise invalid("each", "needs a continuation")
        if self.continuation is None:
            return
        if self.token != "max" or self.position != -1 or self.contrast is not None:
            raise invalid("continuation", "excludes token, position and contrast")
        if isinstance(self.continuation, str):
            check_text(self.continuation, "continuation")
        else:
            _set(self, "continuation", token_ids(self.continuation, "continuation"))


TargetLike: TypeAlias = str | int | Target


def _set(target: Target, name: str, value: object) -> None:
    object.__setattr__(target, name, value)


def token_ids(ids: Any, field: str) -> tuple[int, ...]:
    """Return token ids as ints, from a list, a tuple or a 1-d array of whole numbers."""
    if hasattr(ids, "tolist"):
        ids = ids.tolist()
    if isinstance(ids, str | bytes) or not isinstance(ids, Sequence):
        raise invalid(field, f"must be a sequence of token ids, not {type(ids).__name__}")
    if not ids:
        raise invalid(field, "must not be empty")
    # The common case: a hundred times faster than checking the numbers one by one.
    if all(type(number) is int for number in ids) and min(ids) >= 0 and max(ids) <= _MAX_ID:
        return tuple(ids)
    return tuple(
        whole_number(number, f"{field}[{index}]", most=_MAX_ID) for index, number in enumerate(ids)
    )


def _token(value: Any, field: str) -> str | int:
    if isinstance(value, str):
        check_text(value, field)
        return value
    if isinstance(value, bool | float) or not hasattr(value, "__index__"):
        raise invalid(field, f"must be a token's text or a token id, not {value!r}")
    return whole_number(value, field, most=_MAX_ID)


def is_several(target: object) -> bool:
    """Tell whether a `target` argument asks for a list of traces."""
    return isinstance(target, list | tuple) or (isinstance(target, Target) and target.each)


def to_wire(target: Any) -> list[types_pb2.Target]:
    """Translate a `target` argument; errors name "target", or "target[i]" in a list."""
    if not isinstance(target, list | tuple):
        return [_one_to_wire(target, "target")]
    if not target:
        raise invalid("target", "a list of targets must not be empty")
    return [_one_to_wire(part, f"target[{index}]") for index, part in enumerate(target)]


def _one_to_wire(target: Any, field: str) -> types_pb2.Target:
    if not isinstance(target, Target):
        try:
            target = Target(token=_token(target, field))
        except InvalidArgument:
            if isinstance(target, str):
                raise
            raise invalid(
                field,
                'must be "max", a token\'s text, a token id, a reltrace.Target or a list of '
                f"them, not {target!r}",
            ) from None
    wire = types_pb2.Target(logprob=target.logprob)
    if target.continuation is not None:
        wire.continuation.each = target.each
        if isinstance(target.continuation, str):
            wire.continuation.text = target.continuation
        else:
            wire.continuation.ids.ids.extend(target.continuation)
        return wire
    # Defaults are not sent.
    if target.token != "max":
        wire.token.CopyFrom(_token_to_wire(target.token))
    if target.position != -1:
        wire.position = target.position
    if target.contrast is not None:
        wire.contrast.CopyFrom(_token_to_wire(target.contrast))
    return wire


def _token_to_wire(token: str | int) -> types_pb2.TokenRef:
    if isinstance(token, str):
        return types_pb2.TokenRef(text=token)
    return types_pb2.TokenRef(id=token)


def caller_field(wire_field: str, target: object) -> str:
    """Return the caller's name of the wire field "targets[i]...", given the `target` argument."""
    head, _, inside = wire_field.partition(".")
    index = int(head[len("targets[") : -1]) if head.startswith("targets[") else 0
    several = isinstance(target, list | tuple)
    parts: Sequence[object] = target if isinstance(target, list | tuple) else (target,)
    name = f"target[{index}]" if several else "target"
    # A text or an id has no fields, so that the whole argument is at fault.
    if inside and index < len(parts) and isinstance(parts[index], Target):
        return f"{name}.{inside.split('.')[0]}"
    return name
