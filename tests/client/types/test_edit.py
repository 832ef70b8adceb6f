"""Edits as the caller writes them, and as they travel."""

import numpy as np
import pytest
import reltrace
from fake_server import FakeServer
from reltrace import Edit, Steer
from reltrace.types.edit import edits_to_wire
from reltrace_proto.v1 import types_pb2


def test_an_edit_as_it_travels() -> None:
    wire = Edit("neuron", 3, features=[1, 5], positions=-1, value=2.5).to_wire()
    assert (wire.site, wire.layer, list(wire.features), list(wire.positions)) == (
        "neuron", 3, [1, 5], [-1],
    )  # fmt: skip
    assert wire.WhichOneof("change") == "value"
    assert wire.value == 2.5
    everything = Edit("embed", scale=0).to_wire()
    assert (everything.layer, list(everything.features), list(everything.positions)) == (0, [], [])
    assert everything.WhichOneof("change") == "scale"
    mean = Edit("embed", positions=(1, 2), mean=True).to_wire()
    assert (mean.WhichOneof("change"), mean.mean, list(mean.positions)) == ("mean", True, [1, 2])


def test_a_direction_is_little_endian_float32() -> None:
    wire = Edit("resid", 1, direction=np.array([1.0, -2.0])).to_wire()
    assert np.frombuffer(wire.direction, "<f4").tolist() == [1.0, -2.0]


def test_steering_is_an_edit_of_a_neuron_or_of_the_residual_stream() -> None:
    neuron = Steer(2, 17, scale=0).edit()
    assert (neuron.site, neuron.layer, neuron.features, neuron.scale) == ("neuron", 2, 17, 0)
    along = Steer(4, direction=[1.0, 2.0], scale=-3, positions=(0, 1)).edit()
    assert (along.site, along.layer, along.positions) == ("resid", 4, (0, 1))
    assert along.direction.tolist() == [-3.0, -6.0]


def test_one_or_several_edits_of_either_kind() -> None:
    assert len(edits_to_wire(Steer(0, 1, value=1))) == 1
    assert len(edits_to_wire([Edit("resid", scale=1), Steer(0, 1, value=1)])) == 2


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Edit("resid"), "value: give one of value, scale, direction and mean, not 0"),
        (lambda: Edit("resid", value=1, scale=2), "mean, not value and scale"),
        (lambda: Edit("embed", mean=False), 'mean: must be True, and the site "embed"'),
        (lambda: Edit("resid", mean=True), 'mean: must be True, and the site "embed"'),
        (lambda: Edit("embed", features=1, mean=True), "features: is not for a mean"),
        (lambda: Edit("", value=1), "site: must be the name of a site"),
        (
            lambda: Edit("neuron", -1, value=1),
            "layer: must be a whole number from 0 to 4294967295, not -1",
        ),
        (
            lambda: Edit("neuron", True, value=1),
            "layer: must be a whole number from 0 to 4294967295, not True",
        ),
        (lambda: Edit("neuron", features=[], value=1), "features: is empty"),
        (
            lambda: Edit("neuron", features=[1, -1], value=1),
            r"features\[1\]: must be a whole number from 0",
        ),
        (lambda: Edit("neuron", features="x", value=1), "features: must be a number or a seq"),
        (
            lambda: Edit("neuron", positions=2**31, value=1),
            r"positions\[0\]: must be a whole number from -2147483648 to 2147483647",
        ),
        (
            lambda: Edit("resid", value=float("nan")),
            r"value: must be a number from -1e\+09 to 1e\+09, not nan",
        ),
        (
            lambda: Edit("resid", value="1"),
            r"value: must be a number from -1e\+09 to 1e\+09, not '1'",
        ),
        (lambda: Edit("resid", direction=[[1.0]]), r"direction: must be a vector, not an array"),
        (lambda: Edit("resid", direction="abc"), "direction: must be a vector of numbers"),
        (
            lambda: Edit("resid", direction=[np.inf]),
            r"direction: must be -1e\+09 to 1e\+09 throughout",
        ),
        (
            lambda: Edit("resid", scale=-2e9),
            r"scale: must be a number from -1e\+09 to 1e\+09, not -2000000000",
        ),
        (lambda: Edit("resid", features=1, direction=[1.0]), "features: is not for a direction"),
        (lambda: Steer(1), "neuron: give either a neuron or a direction"),
        (lambda: Steer(1, 2, 1.0, direction=[1.0]), "neuron: give either a neuron or a direction"),
        (lambda: Steer(1, value=1.0, direction=[1.0]), "value: is for a neuron"),
        (lambda: Steer(1, 2), "value: give one of"),
        (lambda: edits_to_wire("x"), "edits: must be a sequence of Edit or Steer"),
        (lambda: edits_to_wire([1]), r"edits\[0\]: must be an Edit or a Steer, not int"),
    ],
)
def test_what_can_not_be_is_named(make, said: str) -> None:
    with pytest.raises(reltrace.InvalidArgument, match=said):
        make()


def jobs(server: FakeServer) -> list[types_pb2.JobSpec]:
    return [spec for submission in server.submissions.values() for spec in submission.specs]


def test_edits_reach_the_server_for_all_items_or_for_one(
    client: reltrace.Client, server: FakeServer
) -> None:
    off = Steer(0, 3, scale=0)
    list(client.trace_many(["a", {"prompt": "b", "edits": [off, off]}], edits=off))
    assert sorted(len(job.edits) for job in jobs(server)) == [1, 2]


def test_without_sites_there_is_no_backward_pass(
    client: reltrace.Client, server: FakeServer
) -> None:
    trace = client.trace("a", sites=())
    assert jobs(server)[-1].forward_only
    assert trace.sites == ()
    assert isinstance(trace.target.logit, float)
    with pytest.raises(KeyError, match="no site was requested"):
        trace.relevance  # noqa: B018 - it raises
