"""Evaluations through the client, on a server that rejects one prompt or all of them."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Iterator

import grpc
import pytest
import reltrace
from fake_server import FakeServer
from reltrace_proto.v1 import types_pb2

PLACE = "; by default the id is the prompt's number"
PROMPTS = ["We have a dog", {"id": "b", "prompt": "My cats love"}, "one more"]


def refusing(field: str, *prompts: str) -> object:
    """Faults of a field: of some prompts, or of all."""

    def faults(spec: types_pb2.JobSpec) -> list[tuple[str, str]]:
        return [(field, "is not served")] if not prompts or spec.prompt in prompts else []

    return faults


@pytest.mark.parametrize(
    ("field", "code", "error", "said"),
    [
        ("model", grpc.StatusCode.NOT_FOUND, reltrace.ModelNotFound, "model: is not served"),
        ("rule", grpc.StatusCode.INVALID_ARGUMENT, reltrace.InvalidArgument, "rules: is not"),
        ("sites[0]", grpc.StatusCode.INVALID_ARGUMENT, reltrace.InvalidArgument, "site: is not"),
        ("targets[0]", grpc.StatusCode.INVALID_ARGUMENT, reltrace.InvalidArgument, "target: is"),
    ],
)
def test_what_is_wrong_with_all_prompts_is_raised(
    field: str,
    code: grpc.StatusCode,
    error: type[reltrace.TraceError],
    said: str,
    server: FakeServer,
    client: reltrace.Client,
) -> None:
    server.faults, server.rejection = refusing(field), code  # type: ignore[assignment]
    with pytest.raises(error) as caught:
        client.evaluate(PROMPTS)
    assert type(caught.value) is error
    # Without the number of one of many jobs.
    assert str(caught.value).startswith(said)
    assert [f"{v.field}: {v.description}" for v in caught.value.violations] == [str(caught.value)]


@pytest.mark.parametrize("field", ["targets[0].token", "targets[0].position", "input"])
def test_what_is_wrong_with_one_prompt_costs_no_other(
    field: str, server: FakeServer, client: reltrace.Client
) -> None:
    server.faults = refusing(field, "My cats love")  # type: ignore[assignment]
    target = reltrace.Target("dogs", position=-1)
    prompts = [{"prompt": "My cats love", "id": "b", "target": target}, "We have a dog"]
    found = client.evaluate(prompts)
    assert found.prompts == 1
    name = {"input": "prompt"}.get(field, field.replace("targets[0]", "target"))
    assert {key: str(e) for key, e in found.failures.items()} == {"b": f"{name}: is not served"}


def test_a_position_that_no_prompt_has_is_theirs(
    server: FakeServer, client: reltrace.Client
) -> None:
    server.faults = refusing("targets[0].position")  # type: ignore[assignment]
    found = client.evaluate(PROMPTS, target=reltrace.Target(position=99))
    assert list(found.failures) == [0, "b", 2]
    with pytest.raises(reltrace.InvalidArgument, match=r"none of 3 could be evaluated: 0: target"):
        found.best()


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        ([], "prompts: is empty"),
        (iter([]), "prompts: is empty"),
        ("We have a dog", "prompts: must be an iterable of prompts, not one str"),
        ([*PROMPTS, PROMPTS[1]], "prompts[3].id: 'b' is that of prompts[1]" + PLACE),
        (
            iter(["x", {"prompt": "y", "id": 2}, "z"]),
            "prompts[2].id: 2 is that of prompts[1]" + PLACE,
        ),
        ({"prompt": "We have a dog"}, "prompts: must be an iterable of prompts, not one dict"),
        (None, "prompts: must be an iterable of prompts, not NoneType"),
    ],
)
def test_what_are_no_prompts(prompts: object, said: str, client: reltrace.Client) -> None:
    with pytest.raises(reltrace.InvalidArgument) as caught:
        client.evaluate(prompts)  # type: ignore[arg-type]
    assert str(caught.value) == said


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"target": [" dogs", " cats"]}, "target: must be one, not several"),
        (
            {"target": reltrace.Target(continuation=[1], each=True)},
            "target: must be one, not several",
        ),
        ({"target": ""}, "target: must not be empty"),
        ({"measure": "log"}, "measure: must be one of"),
        ({"target": 3.5}, "target: must be"),
        ({"model": 3}, "model: must be str"),
        ({"priority": "high"}, "priority: must be one of"),
        ({"timeout": -1}, "timeout: must be a number of seconds"),
        ({"seed": -1}, "seed: must be a whole number from 0"),
    ],
)
def test_arguments_are_looked_at_before_prompts_are(
    wrong: dict[str, object], said: str, server: FakeServer, client: reltrace.Client
) -> None:
    pulled: list[str] = []

    def prompts() -> Iterator[str]:
        pulled.append("one")
        yield "We have a dog"

    with pytest.raises(reltrace.InvalidArgument, match=said):
        client.evaluate(prompts(), **wrong)  # type: ignore[arg-type]
    assert not pulled
    assert not server.requests


def test_a_list_is_looked_at_to_its_end_first(server: FakeServer, client: reltrace.Client) -> None:
    with pytest.raises(reltrace.InvalidArgument, match=r"prompts\[200\]: has 'rule'"):
        client.evaluate([*["We have a dog"] * 200, {"prompt": "a", "rule": "gradient"}])
    assert not server.requests


def test_prompts_come_from_any_iterable(client: reltrace.Client) -> None:
    """
    Given more prompts than are evaluated at a time, from a generator that asks the same client
    I expect all to be evaluated.
    """

    def prompts() -> Iterator[str]:
        for number in range(70):
            yield client.trace(f"prompt {number}").tokens[1]

    found = client.evaluate(prompts(), rules=["attnlrp"], points=2)
    assert (found.prompts, found.failures) == (70, {})
    assert found.rules["attnlrp"].area.count == 70


async def test_async_clients_take_async_iterables(server: FakeServer) -> None:
    async def prompts() -> AsyncIterator[str]:
        yield "We have a dog"

    async with reltrace.AsyncClient(server.address) as client:
        found = await client.evaluate(prompts(), rules=["attnlrp"], points=2)
    assert found.prompts == 1


def test_what_prompts_raise_is_raised(client: reltrace.Client) -> None:
    def prompts() -> Iterator[str]:
        yield "We have a dog"
        raise TimeoutError("the corpus is away")

    with pytest.raises(TimeoutError, match="the corpus is away"):
        client.evaluate(prompts())


def test_located_are_those_that_were_evaluated(server: FakeServer, client: reltrace.Client) -> None:
    """
    Given a prompt that is traced and whose forward passes then fail
    I expect its answer to count nowhere.
    """
    server.faults = lambda spec: (
        [("edits[0]", "no")] if len(spec.input_ids.ids) == 4 and spec.edits else []
    )
    prompts = [
        {"prompt": "My cats love", "answer": "cats"},
        {"prompt": "We have a dog", "answer": "dog"},
    ]
    found = client.evaluate(prompts, rules=["attnlrp"], points=2)
    assert (found.prompts, list(found.failures)) == (1, [0])
    hit = found.rules["attnlrp"].hit
    assert hit is not None
    assert hit.count == 1


def test_conversations_are_prompts(server: FakeServer, client: reltrace.Client) -> None:
    """Of which the template's special tokens stay."""
    chat = [
        {"role": "system", "content": "Be brief"},
        {"role": "user", "content": "The capital of Peru"},
    ]
    prompt = {"messages": chat, "answer": "Peru", "target": " Lima"}
    found = client.evaluate([prompt], rules=["attnlrp", "random"], points=3)
    assert (found.prompts, found.failures) == (1, {})
    hit = found.rules["attnlrp"].hit
    assert hit is not None
    assert hit.count == 1
    jobs = [job for request in server.requests for job in request.jobs]
    (traced,) = [job for job in jobs if job.WhichOneof("input") == "chat"]
    assert traced.targets[0].continuation.text == " Lima"
    off = {position for job in jobs for edit in job.edits for position in edit.positions}
    # <system> and <user> are at 0 and 3.
    assert off == {1, 2, 4, 5, 6, 7}


def test_a_token_in_place_of_others_is_looked_up_first(
    server: FakeServer, client: reltrace.Client
) -> None:
    found = client.evaluate(["We have a dog"], rules=["attnlrp"], points=2, replace=" the")
    # The server that is asked calls any token so.
    assert (found.replace, found.replace_id) == (" the", 7)
    first = server.requests[0].jobs[0]
    assert (first.targets[0].token.text, first.forward_only) == (" the", True)
    measured = [
        list(job.input_ids.ids)
        for request in server.requests[1:]
        for job in request.jobs
        if job.forward_only
    ]
    assert [0, 7, 7, 7, 7] in measured
    server.faults = refusing("targets[0].token", "")  # type: ignore[assignment]
    with pytest.raises(reltrace.InvalidArgument, match=r"^replace: is not served"):
        client.evaluate(["We have a dog"], replace=" the")


def test_the_bar_counts_prompts(
    server: FakeServer, client: reltrace.Client, capsys: pytest.CaptureFixture[str]
) -> None:
    server.faults = refusing("input", "My cats love")  # type: ignore[assignment]
    client.evaluate(PROMPTS, points=2, progress=True)
    bar = capsys.readouterr().err
    assert "3/3" in bar
    assert "prompt/s" in bar
    assert "failed=1" in bar
    client.evaluate(PROMPTS, points=2)
    assert capsys.readouterr().err == ""


def test_a_timeout_is_that_of_the_whole_run(stuck: FakeServer, client: reltrace.Client) -> None:
    with pytest.raises(reltrace.DeadlineExceeded, match=r"within the timeout of 0\.2 s"):
        client.evaluate(PROMPTS, timeout=0.2)
    assert stuck.cancelled


def test_a_timeout_is_that_of_prompts_that_do_not_come(client: reltrace.Client) -> None:
    release = threading.Event()

    def prompts() -> Iterator[str]:
        release.wait(30)
        yield "We have a dog"

    with pytest.raises(reltrace.DeadlineExceeded, match=r"within the timeout of 0\.2 s"):
        client.evaluate(prompts(), timeout=0.2)
    release.set()


def test_a_text_is_another_id_than_the_number(client: reltrace.Client) -> None:
    prompts = [{"id": "1", "prompt": "We have a dog"}, "My cats love", {"id": 2, "prompt": "more"}]
    assert client.evaluate(prompts, rules=["gradient"]).prompts == 3
