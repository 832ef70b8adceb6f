"""`target` arguments and `Target`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import reltrace
from reltrace import Target
from reltrace.types.target import caller_field, to_wire
from reltrace_proto.v1 import types_pb2 as pb


@pytest.mark.parametrize(
    ("target", "wire"),
    [
        ("max", pb.Target()),
        (" dogs", pb.Target(token=pb.TokenRef(text=" dogs"))),
        (0, pb.Target(token=pb.TokenRef(id=0))),
        (np.int64(7), pb.Target(token=pb.TokenRef(id=7))),
        (Target(), pb.Target()),
        (Target(position=0), pb.Target(position=0)),
        (Target("a", position=-2), pb.Target(token=pb.TokenRef(text="a"), position=-2)),
        (
            Target(5, contrast="b"),
            pb.Target(token=pb.TokenRef(id=5), contrast=pb.TokenRef(text="b")),
        ),
        (Target(logprob=True), pb.Target(logprob=True)),
        (Target(continuation=" x y"), pb.Target(continuation=pb.Continuation(text=" x y"))),
        (
            Target(continuation=np.array([3, 4]), each=True),
            pb.Target(continuation=pb.Continuation(ids=pb.TokenIds(ids=[3, 4]), each=True)),
        ),
    ],
)
def test_to_wire(target: Any, wire: pb.Target) -> None:
    assert to_wire(target) == [wire]


def test_a_list_keeps_its_order() -> None:
    assert to_wire(["max", 3]) == [pb.Target(), pb.Target(token=pb.TokenRef(id=3))]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("", "target: must not be empty"),
        ([], "target: a list of targets must not be empty"),
        (1.5, 'target: must be "max", a token\'s text, a token id, a reltrace.Target or a list'),
        (True, 'target: must be "max", a token'),
        (None, 'target: must be "max", a token'),
        (["ok", -1], r"target\[1\]: must be"),
        ("\udc80", "target: character 0 is a lone surrogate"),
    ],
)
def test_bad_targets(target: Any, message: str) -> None:
    with pytest.raises(reltrace.InvalidArgument, match=f"^{message}"):
        to_wire(target)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"token": 2**32}, "token: must be a whole number from 0 to 4294967295"),
        ({"token": None}, "token: must be a token's text or a token id, not None"),
        (
            {"position": 1.0},
            "position: must be a whole number from -2147483648 to 2147483647, not 1.0",
        ),
        ({"position": 2**31}, "position: must be a whole number from -2147483648 to 2147483647"),
        ({"contrast": False}, "contrast: must be a token's text or a token id"),
        ({"continuation": []}, "continuation: must not be empty"),
        (
            {"continuation": [1, "b"]},
            r"continuation\[1\]: must be a whole number from 0 to 4294967295, not 'b'",
        ),
        ({"continuation": 5}, "continuation: must be a sequence of token ids, not int"),
        ({"continuation": "x", "token": "y"}, "continuation: excludes token, position and"),
        ({"continuation": "x", "contrast": 1}, "continuation: excludes token, position and"),
        ({"each": True}, "each: needs a continuation"),
        ({"logprob": 1}, "logprob: must be True or False, not 1"),
    ],
)
def test_bad_fields(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(reltrace.InvalidArgument, match=f"^{message}"):
        Target(**arguments)


def test_a_target_can_be_a_key() -> None:
    assert len({Target(continuation=[1, 2]), Target(continuation=(1, 2)), Target("a")}) == 2


@pytest.mark.parametrize(
    ("wire_field", "target", "name"),
    [
        ("targets[0].token", "cats", "target"),
        ("targets[0].token.text", Target("cats"), "target.token"),
        ("targets[1].contrast", ["a", Target("b", contrast="c")], "target[1].contrast"),
        ("targets[1]", ["a", "b"], "target[1]"),
        ("targets", "a", "target"),
    ],
)
def test_caller_field(wire_field: str, target: Any, name: str) -> None:
    assert caller_field(wire_field, target) == name
