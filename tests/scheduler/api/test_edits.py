"""Edits that the scheduler refuses before a worker sees them."""

import struct

import pytest
from reltrace_proto.v1 import types_pb2
from reltrace_scheduler.api.edits import edit_faults

MODEL = types_pb2.ModelInfo(
    layers=4, hidden_size=3, heads=2, intermediate_size=5,
    sites=["embed", "resid", "head", "neuron"],
)  # fmt: skip


def faults(*edits: types_pb2.Edit) -> list[tuple[str, str]]:
    spec = types_pb2.JobSpec(edits=edits)
    return [(fault.field, fault.description) for fault in edit_faults(spec, MODEL)]


def floats(*values: float) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


def test_edits_that_can_be() -> None:
    assert faults() == []
    assert (
        faults(
            types_pb2.Edit(site="neuron", layer=3, features=[0, 4], positions=[-1], value=0),
            types_pb2.Edit(site="embed", scale=2),
            types_pb2.Edit(site="embed", positions=[1], mean=True),
            types_pb2.Edit(site="head", features=[1], scale=0),
            types_pb2.Edit(site="resid", direction=floats(1, 2, 3)),
        )
        == []
    )


@pytest.mark.parametrize(
    ("fields", "field", "said"),
    [
        ({"site": "mlp", "value": 1}, "site", "'mlp' is not one of embed, resid, head, neuron"),
        ({"site": "resid", "layer": 4, "value": 1}, "layer", "4 is not in 0..3 of resid"),
        ({"site": "embed", "layer": 1, "value": 1}, "layer", "1 is not in 0..0 of embed"),
        (
            {"site": "neuron", "features": [1, 5], "value": 1},
            "features[1]",
            "5 is not in 0..4 of neuron",
        ),
        ({"site": "head", "features": [2], "value": 1}, "features[0]", "2 is not in 0..1 of head"),
        ({"site": "resid"}, "change", "is missing: give a value, a scale, a direction or"),
        ({"site": "embed", "mean": False}, "change", "is missing: give a value, a scale"),
        ({"site": "resid", "mean": True}, "mean", "is for the site embed, not resid"),
        (
            {"site": "embed", "features": [0], "mean": True},
            "features",
            "is not for the mean, which is set as a whole",
        ),
        ({"site": "resid", "scale": float("inf")}, "scale", "is inf; allowed: -1e+09 to 1e+09"),
        ({"site": "resid", "value": -1e38}, "value", "is -1e+38; allowed: -1e+09 to 1e+09"),
        (
            {"site": "resid", "direction": floats(1)},
            "direction",
            "has 1 values; resid has 3 features, each a float32",
        ),
        (
            {"site": "resid", "direction": floats(1, 2, float("nan"))},
            "direction",
            "has a number that is nan; allowed: -1e+09 to 1e+09",
        ),
        ({"site": "head", "direction": floats(1, 2)}, "direction", "is not for heads"),
        (
            {"site": "resid", "features": [0], "direction": floats(1, 2, 3)},
            "features",
            "is not for a direction",
        ),
    ],
)
def test_what_is_wrong_is_named(fields: dict, field: str, said: str) -> None:
    good = types_pb2.Edit(site="resid", value=1)
    ((where, what),) = faults(good, types_pb2.Edit(**fields))
    assert where == f"edits[1].{field}"
    assert said in what


def test_they_are_bounded() -> None:
    edit = types_pb2.Edit(site="resid", value=1)
    assert faults(*[edit] * 256) == []
    assert faults(*[edit] * 257) == [("edits", "has 257; at most 256 are allowed")]
    wide = types_pb2.Edit(site="resid", positions=range(65537), value=1)
    assert "at most 65536" in faults(wide)[0][1]
