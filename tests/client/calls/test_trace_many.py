"""`Client.trace_many`: every item gives one result, whatever happens to the others."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
import reltrace
from fake_results import LAYERS, failed_chunk, relevance_of
from fake_server import FakeServer, queue_full, status_with
from google.rpc import code_pb2
from reltrace.calls import trace_many as many
from reltrace_proto.v1 import types_pb2


def prompts(count: int) -> list[str]:
    return [f"prompt number {index}" for index in range(count)]


def check(trace: reltrace.Trace, prompt: str) -> None:
    text = f"<s> {prompt}"
    expected = relevance_of(text, "resid", (LAYERS, len(text.split())))
    np.testing.assert_array_equal(trace.relevance, expected)


def failures(results: list[Any]) -> dict[Any, str]:
    return {r.id: str(r.error) for r in results if isinstance(r, reltrace.Failure)}


def test_every_prompt_gives_its_trace(server: FakeServer, client: reltrace.Client) -> None:
    results = list(client.trace_many(prompts(600)))
    assert sorted(trace.id for trace in results) == list(range(600))
    for trace in results:
        check(trace, prompts(600)[trace.id])
    assert sorted(len(request.jobs) for request in server.requests) == [88, 256, 256]
    server.wait_acknowledged()


def test_results_come_as_they_finish(server: FakeServer, client: reltrace.Client) -> None:
    server.reverse = True
    assert [trace.id for trace in client.trace_many(prompts(5))] == [4, 3, 2, 1, 0]


def test_results_come_in_order_on_demand(server: FakeServer, client: reltrace.Client) -> None:
    server.reverse = True
    results = client.trace_many(prompts(40), ordered=True, max_in_flight=10)
    assert [trace.id for trace in results] == list(range(40))


def test_results_come_in_order_through_a_small_buffer(
    server: FakeServer, client: reltrace.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every result is above the bound, and the next one may be in any of several streams."""
    monkeypatch.setattr(many, "_MAX_UNREAD_BYTES", 1)
    server.reverse = True
    results = client.trace_many(prompts(600), ordered=True)
    assert [trace.id for trace in results] == list(range(600))
    assert len(server.requests) > 2


def test_items_are_mappings_with_ids(server: FakeServer, client: reltrace.Client) -> None:
    items = [
        {"id": "a", "prompt": "one two", "sites": "embed"},
        {"prompt": "three"},
        {"id": 7, "input_ids": [1, 2, 3], "target": ["x", 5]},
    ]
    one, two, three = client.trace_many(items, ordered=True)
    assert (one.id, one.sites, one.relevance.shape) == ("a", ("embed",), (3,))
    assert (two.id, two.sites) == (1, ("resid",))
    assert [trace.id for trace in three] == [7, 7]


def test_a_list_of_targets_gives_lists(client: reltrace.Client) -> None:
    results = list(client.trace_many(prompts(3), target=["a", "b"], ordered=True))
    assert [[trace.id for trace in traces] for traces in results] == [[0, 0], [1, 1], [2, 2]]


def test_invalid_items_fail_alone(server: FakeServer, client: reltrace.Client) -> None:
    items = [
        "good",
        "",
        {"id": "x", "prompt": "a\ud800b"},
        {"id": "y", "promt": "typo"},
        {"id": "z", "prompt": "fine", "dtype": "int8"},
        17,
        {"id": 1.5, "prompt": "odd id"},
        {"id": "\ud800", "prompt": "no id that a file holds"},
        "also good",
    ]
    results = list(client.trace_many(items, ordered=True))
    assert [type(result).__name__ for result in results] == ["Trace"] + ["Failure"] * 7 + ["Trace"]
    found = failures(results)
    assert found[1] == "item 1: prompt: must not be empty"
    assert found["x"].startswith("item 'x': prompt: character 1 is a lone surrogate")
    assert found["y"].startswith("item 'y': promt: is not an argument of trace(); allowed: id,")
    assert found["z"].startswith("item 'z': dtype: must be one of float32")
    assert found[5] == "item 5: item: must be a prompt or a mapping of arguments, not int"
    assert found[6] == "item 6: id: must be text or a whole number, not 1.5"
    assert found[7].startswith("item 7: id: character 0 is a lone surrogate")
    assert server.jobs_submitted() == 2


def test_rejected_items_fail_and_the_others_finish(
    server: FakeServer, client: reltrace.Client
) -> None:
    server.faults = lambda spec: (
        [("sites[0]", "unknown site 'x'")] if spec.prompt.endswith(("3", "5")) else []
    )
    results = list(client.trace_many(prompts(10), ordered=True))
    assert [result.id for result in results] == list(range(10))
    assert failures(results) == {
        index: f"item {index}: sites[0]: unknown site 'x'" for index in (3, 5)
    }
    for trace in results[:3]:
        check(trace, prompts(10)[trace.id])
    assert [len(request.jobs) for request in server.requests] == [10, 8]
    assert server.requests[0].idempotency_key != server.requests[1].idempotency_key


def test_an_unknown_model_is_asked_for_once(server: FakeServer, client: reltrace.Client) -> None:
    server.rejection = grpc.StatusCode.NOT_FOUND
    first = True

    def faults(spec: types_pb2.JobSpec) -> list[tuple[str, str]]:
        # A server may stop at the first fault.
        nonlocal first
        if spec.model == "nope" and first:
            first = False
            return [("model", "'nope' is not served; served: fake")]
        return []

    server.faults = faults
    items = [{"prompt": f"p {i}", "model": "nope" if i % 2 else "fake"} for i in range(6)]
    results = list(client.trace_many(items, ordered=True))
    assert sorted(failures(results)) == [1, 3, 5]
    assert all(isinstance(results[i].error, reltrace.ModelNotFound) for i in (1, 3, 5))
    assert [len(request.jobs) for request in server.requests] == [6, 3]


def test_a_job_that_fails_on_its_worker_fails_alone(
    server: FakeServer, client: reltrace.Client
) -> None:
    from fake_results import chunks_of

    def run(spec: types_pb2.JobSpec, job_id: str) -> list[types_pb2.ResultChunk]:
        if spec.prompt.endswith("1"):
            state = types_pb2.JOB_STATE_FAILED
            code = code_pb2.INVALID_ARGUMENT
            return [failed_chunk(job_id, state, code, "300 tokens; at most 128", "prompt")]
        return chunks_of(spec, job_id, 1 << 20)

    server.run = run
    results = list(client.trace_many(prompts(3), ordered=True))
    assert failures(results) == {1: "item 1: prompt: 300 tokens; at most 128"}


def test_everything_arrives_once_over_a_bad_line(
    server: FakeServer, client: reltrace.Client
) -> None:
    server.piece_bytes = 16
    server.drop_at = {2, 3, 17, 40, 41, 77}
    server.lose_answer = True
    server.submit_errors += [status_with(grpc.StatusCode.UNAVAILABLE, "starting"), queue_full(0.01)]
    results = list(client.trace_many(prompts(12)))
    assert sorted(trace.id for trace in results) == list(range(12))
    for trace in results:
        check(trace, prompts(12)[trace.id])
    assert server.jobs_submitted() == 12


@pytest.mark.parametrize("ordered", [False, True])
def test_what_does_not_fit_the_servers_bound_is_split(
    server: FakeServer, client: reltrace.Client, ordered: bool
) -> None:
    """
    Given 900 prompts for a server of which no submission may have more than 100
    I expect all results, and after the first refusals no more messages that are too large.
    """
    server.max_jobs = 100
    many = prompts(900)
    results = list(client.trace_many(iter(many), ordered=ordered, max_in_flight=256))
    assert [trace.id for trace in results] == list(range(900)) or not ordered
    assert sorted(trace.id for trace in results) == list(range(900))
    sizes = [len(request.jobs) for request in server.requests]
    assert sum(size <= 100 for size in sizes) > 8
    assert max(sizes[-8:]) <= 100
    assert server.jobs_submitted() == 900


def test_one_that_does_not_fit_alone_fails_alone(
    server: FakeServer, client: reltrace.Client
) -> None:
    server.max_jobs = 0
    results = list(client.trace_many(prompts(3), ordered=True))
    assert failures(results) == {n: f"item {n}: jobs: at most 0 fit" for n in range(3)}
    with pytest.raises(reltrace.InvalidArgument, match="jobs: at most 0 fit"):
        client.trace("a")


def test_a_source_is_pulled_no_further_than_allowed(
    server: FakeServer, client: reltrace.Client
) -> None:
    pulled = 0
    most_ahead = 0
    taken = 0

    def source() -> Iterator[str]:
        nonlocal pulled, most_ahead
        for prompt in prompts(200):
            pulled += 1
            most_ahead = max(most_ahead, pulled - taken)
            yield prompt

    for _ in client.trace_many(source(), max_in_flight=8):
        taken += 1
    assert (taken, pulled) == (200, 200)
    # The result in the consumer's hands is not yet counted in `taken` above.
    assert most_ahead <= 8 + 1


def test_an_endless_source_may_be_left(server: FakeServer, client: reltrace.Client) -> None:
    def source() -> Iterator[str]:
        index = 0
        while True:
            yield f"prompt number {index}"
            index += 1

    results = client.trace_many(source(), max_in_flight=20)
    assert isinstance(next(results), reltrace.Trace)
    results.close()  # type: ignore[attr-defined]
    assert server.jobs_submitted() <= 40
    assert client.trace("still alive").tokens == ["<s>", "still", "alive"]


def test_a_source_that_blocks_does_not_hold_back_what_it_gave(
    server: FakeServer, client: reltrace.Client
) -> None:
    seen = threading.Event()

    def source() -> Iterator[str]:
        yield "first one"
        assert seen.wait(10), "the first result was held back"
        yield "second one"

    results = client.trace_many(source())
    check(next(results), "first one")
    seen.set()
    check(next(results), "second one")
    assert list(results) == []


def test_an_error_of_the_source_comes_after_the_results(
    server: FakeServer, client: reltrace.Client
) -> None:
    def source() -> Iterator[str]:
        yield from prompts(3)
        raise OSError("disk on fire")

    results = client.trace_many(source())
    assert sorted(next(results).id for _ in range(3)) == [0, 1, 2]
    with pytest.raises(OSError, match="disk on fire"):
        next(results)


def test_what_all_items_share_is_checked_at_once(client: reltrace.Client) -> None:
    with pytest.raises(reltrace.InvalidArgument, match=r"^dtype: must be one of"):
        client.trace_many(prompts(2), dtype="int8")
    with pytest.raises(
        reltrace.InvalidArgument, match=r"^max_in_flight: must be a whole number from 1 on"
    ):
        client.trace_many(prompts(2), max_in_flight=0)
    with pytest.raises(reltrace.InvalidArgument, match=r"^items: must be an iterable of items"):
        client.trace_many("one prompt")
    with pytest.raises(reltrace.InvalidArgument, match=r"^timeout: "):
        client.trace_many(prompts(2), timeout=-1)


def test_async_items_of_the_synchronous_client(client: reltrace.Client) -> None:
    async def source() -> AsyncIterator[str]:
        for prompt in prompts(5):
            yield prompt

    assert [trace.id for trace in client.trace_many(source(), ordered=True)] == list(range(5))


def test_no_items(client: reltrace.Client) -> None:
    assert list(client.trace_many([])) == []


def test_expired_results_are_computed_again(server: FakeServer, client: reltrace.Client) -> None:
    """As after an hour of sleep: what was received is kept, and the rest is submitted anew."""
    gone = status_with(grpc.StatusCode.NOT_FOUND, "submission has expired")
    server.drop_at = {3}
    server.before = lambda method: (
        server.stream_errors.append(gone)
        if method == "StreamResults" and len(server.streams) == 1
        else None
    )
    results = list(client.trace_many(prompts(4), ordered=True))
    assert [check(trace, prompts(4)[trace.id]) for trace in results] == [None] * 4
    assert len(results) == 4
    sizes = [len(request.jobs) for request in server.requests]
    # Under its key, which belongs to all four; then under a new one.
    assert sizes[0] == 4
    assert sizes[-1] < 4
    assert server.requests[-1].idempotency_key != server.requests[0].idempotency_key


def test_results_that_expire_again_and_again_fail_their_items(
    server: FakeServer, client: reltrace.Client
) -> None:
    gone = status_with(grpc.StatusCode.NOT_FOUND, "submission has expired")
    server.stream_errors += [gone] * 4
    results = list(client.trace_many(prompts(2), ordered=True))
    assert failures(results) == {i: f"item {i}: submission has expired" for i in range(2)}
    assert isinstance(results[0].error, reltrace.NotFound)


def test_a_server_that_is_gone_ends_the_run() -> None:
    with (
        reltrace.Client("127.0.0.1:1", retry_timeout=0.1) as client,
        pytest.raises(reltrace.Unavailable, match="tried for 0"),
    ):
        list(client.trace_many(prompts(5)))


def test_the_timeout_ends_the_run(server: FakeServer, client: reltrace.Client) -> None:
    ended = threading.Event()
    server.hold = lambda spec: (ended.wait(5) if spec.prompt.endswith("2") else None, None)[1]
    results = client.trace_many(prompts(5), timeout=0.4)
    assert [next(results).id, next(results).id] == [0, 1]
    with pytest.raises(reltrace.DeadlineExceeded):
        next(results)
    ended.set()


def test_large_results_do_not_pile_up(
    server: FakeServer, client: reltrace.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    from reltrace.calls import trace_many as many

    monkeypatch.setattr(many, "_MAX_UNREAD_BYTES", 200)
    monkeypatch.setattr(many, "_BATCH_JOBS", 4)
    server.reverse = True
    for ordered in (False, True):
        results = client.trace_many(prompts(40), ordered=ordered, max_in_flight=20)
        assert sorted(trace.id for trace in results) == list(range(40))


def test_a_bar(
    server: FakeServer, client: reltrace.Client, capsys: pytest.CaptureFixture[str]
) -> None:
    server.faults = lambda spec: [("prompt", "no")] if spec.prompt.endswith("3") else []
    assert len(list(client.trace_many(prompts(4), progress=True))) == 4
    shown = capsys.readouterr().err
    assert "4/4" in shown
    assert "failed=1" in shown


def test_threads_share_a_client(server: FakeServer, client: reltrace.Client) -> None:
    results: dict[int, list[Any]] = {}

    def work(number: int) -> None:
        results[number] = list(client.trace_many(prompts(20), ordered=True))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert [[t.id for t in results[number]] for number in range(4)] == [list(range(20))] * 4
