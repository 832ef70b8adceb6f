"""Bad input gets an error that names the field; nobody else notices."""

from collections.abc import Iterator

import grpc
import pytest
import reltrace
from reltrace_proto.v1 import trace_pb2, types_pb2
from reltrace_worker.demo import DEMO_MODEL

GOOD = "I have 5 cats and 3 dogs. My cats love to play with my"
BAD = {
    "empty prompt": ({"prompt": ""}, "prompt"),
    "no input": ({}, "prompt"),
    "two inputs": ({"prompt": "a", "input_ids": [1]}, "input_ids"),
    "prompt longer than the context": ({"prompt": "cat " * 5000}, "prompt"),
    "ids longer than the context": ({"input_ids": [5] * 5000}, "input_ids"),
    "id out of range": ({"input_ids": [1, 2, 10_000_000]}, "input_ids"),
    "negative id": ({"input_ids": [1, -2]}, "input_ids"),
    "unknown target token": ({"prompt": "a", "target": "xyzzy plugh"}, "target"),
    "target id out of range": ({"prompt": "a", "target": 10_000_000}, "target"),
    "position out of range": ({"prompt": "a", "target": reltrace.Target(position=99)}, "target"),
    "unknown site": ({"prompt": "a", "sites": ["nowhere"]}, "sites"),
    "unknown rule": ({"prompt": "a", "rule": "magic"}, "rule"),
    "unknown reduction": ({"prompt": "a", "reduce": "sometimes"}, "reduce"),
    "unknown dtype": ({"prompt": "a", "dtype": "float8"}, "dtype"),
    "text that is not Unicode": ({"prompt": "a\udcff"}, "prompt"),
    "message too long": ({"prompt": "x" * (65 << 20)}, "prompt"),
}


@pytest.fixture(autouse=True, scope="module")
def everybody_lives_on(client: reltrace.Client) -> Iterator[None]:
    """The same workers serve the same result before and after all of it."""
    workers = {worker.id for worker in client.status().workers}
    before = client.trace(GOOD, model=DEMO_MODEL, timeout=60)
    yield
    after = client.trace(GOOD, model=DEMO_MODEL, timeout=60)
    assert (after.relevance == before.relevance).all()
    assert {worker.id for worker in client.status().workers} == workers


@pytest.mark.parametrize("name", BAD)
def test_the_error_names_the_field(client: reltrace.Client, name: str) -> None:
    arguments, field = BAD[name]
    with pytest.raises(reltrace.InvalidArgument) as caught:
        client.trace(**{"model": DEMO_MODEL, "timeout": 60} | arguments)
    assert field in str(caught.value)


def test_an_unknown_model_is_answered_with_what_is_served(client: reltrace.Client) -> None:
    with pytest.raises(reltrace.ModelNotFound, match=DEMO_MODEL) as caught:
        client.trace("a", model="nobody/has-this", timeout=60)
    assert "model" in str(caught.value)


def test_a_target_of_several_tokens_shows_how_it_was_split(client: reltrace.Client) -> None:
    with pytest.raises(reltrace.InvalidArgument, match="not exactly one token but"):
        client.trace("a", model=DEMO_MODEL, target="xyzzy plugh", timeout=60)


def test_a_bad_prompt_does_not_cost_its_neighbours(client: reltrace.Client) -> None:
    items = [GOOD, "", {"prompt": GOOD, "id": "named"}, "cat " * 5000, {"input_ids": [1, 9**9]}]
    results = list(
        client.trace_many(items, model=DEMO_MODEL, sites=["embed"], ordered=True, timeout=60)
    )
    assert [type(result).__name__ for result in results] == [
        "Trace",
        "Failure",
        "Trace",
        "Failure",
        "Failure",
    ]
    assert [result.id for result in results] == [0, 1, "named", 3, 4]
    assert all(
        isinstance(result.error, reltrace.InvalidArgument)
        for result in results
        if isinstance(result, reltrace.Failure)
    )


def test_invalid_utf8_on_the_wire(address: str) -> None:
    request = trace_pb2.SubmitJobsRequest(jobs=[types_pb2.JobSpec(prompt="@@@@")])
    data = request.SerializeToString().replace(b"@@@@", b"\xff\xfe\xfd\xfc")
    with grpc.insecure_channel(address) as channel:
        submit = channel.unary_unary("/reltrace.v1.TraceService/SubmitJobs")
        with pytest.raises(grpc.RpcError) as caught:
            submit(data, timeout=10)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "UTF-8" in caught.value.details()
