"""A server that has lost what it accepted: callers get every result, and each once."""

from collections import Counter

import make_text as words
import pytest
import reltrace
from fake_results import chunks_of
from fake_server import FakeServer
from reltrace.client.recording import recording
from reltrace.transport import results as reading
from reltrace_proto.v1 import types_pb2

PROMPTS = [f"prompt {number}" for number in range(10)]


def traced(client: reltrace.Client) -> Counter[int]:
    return Counter(trace.id for trace in client.trace_many(PROMPTS))


EACH_ONCE = Counter(range(len(PROMPTS)))


@pytest.mark.parametrize("received", [0, 4])
def test_a_lost_submission_is_submitted_again_under_its_key(
    server: FakeServer, client: reltrace.Client, received: int, caplog: pytest.LogCaptureFixture
) -> None:
    """
    Given a submission of ten jobs, some results of which were received
    If the server loses it and the stream breaks off
    I expect the others to be submitted under its key, and every result once.
    """
    server.drop_at, server.at_drop = {received + 1}, server.forget
    assert traced(client) == EACH_ONCE
    first, second = server.requests
    assert first.idempotency_key == second.idempotency_key
    assert list(second.jobs) == list(first.jobs)[received:]
    assert f"has lost {10 - received} accepted jobs" in caplog.text
    client.close()
    assert server.acknowledged == {"s1": 10 - received}
    assert server.cancelled == []


def test_what_the_server_may_hold_is_recorded(server: FakeServer, client: reltrace.Client) -> None:
    """As for a batch, whose next run frees what a run that was killed has left."""
    server.drop_at, server.at_drop = {3}, server.forget
    records: list[dict[str, int]] = []
    with recording(client, {}, lambda record: records.append(dict(record))):
        assert traced(client) == EACH_ONCE
        client.close()
    assert [record for record in records if record] == [{"s0": 10}, {"s1": 8}]
    assert records[-1] == {}


def test_one_result_of_a_lost_submission(server: FakeServer, client: reltrace.Client) -> None:
    server.drop_at, server.at_drop = {1, 2}, server.forget
    assert client.trace("a").job_id == "s2-0"
    assert len({request.idempotency_key for request in server.requests}) == 1


def test_a_server_that_loses_everything_is_given_up(
    server: FakeServer, client: reltrace.Client
) -> None:
    server.before_answer = server.forget
    with pytest.raises(reltrace.NotFound, match="is not known here"):
        client.trace("a")
    assert len(server.requests) == 4


def test_a_job_that_is_rejected_the_second_time_fails_alone(
    server: FakeServer, client: reltrace.Client
) -> None:
    def lose() -> None:
        server.forget()
        server.faults = lambda spec: [("prompt", "no")] if spec.prompt.endswith("7") else []

    server.drop_at, server.at_drop = {3}, lose
    results = list(client.trace_many(PROMPTS))
    assert Counter(result.id for result in results) == EACH_ONCE
    (failure,) = (result for result in results if isinstance(result, reltrace.Failure))
    assert (failure.id, type(failure.error)) == (7, reltrace.InvalidArgument)


@pytest.mark.parametrize("pieces", [1 << 20, 16])
@pytest.mark.parametrize("freed", [False, True])
def test_a_server_whose_store_went_back(
    server: FakeServer,
    client: reltrace.Client,
    freed: bool,
    pieces: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """
    Given a reader that received five results of ten, of one chunk or in the middle of several
    If the server's store goes back to before they ended, and the jobs end in another order
    I expect the results whose numbers had been seen to be read too, and each once: if they were
    freed by the acknowledgement of those that had the numbers before, their jobs run again.
    """
    monkeypatch.setattr(reading, "_ACKNOWLEDGE_BYTES", 1 if freed else 1 << 30)
    server.piece_bytes = pieces
    per_job = len(chunks_of(server_spec(client, server), "any", pieces))

    def go_back() -> None:
        if freed:
            server.wait_for(lambda: 5 in server.acknowledged.values())
        server.ended.clear()
        server.reverse = True

    server.drop_at = {server.sent + 5 * per_job + (1 if per_job == 1 else 2)}
    server.at_drop = go_back
    assert traced(client) == EACH_ONCE
    client.close()
    keys = Counter(request.idempotency_key for request in server.requests[1:])
    assert len(keys) == (2 if freed else 1)


def server_spec(client: reltrace.Client, server: FakeServer) -> types_pb2.JobSpec:
    client.trace(PROMPTS[0])
    return server.requests[0].jobs[0]


def test_a_text_whose_job_was_lost_while_it_was_written(
    server: FakeServer, client: reltrace.Client
) -> None:
    """
    Given a text of which a second attempt has written two words
    If the server loses its job, I expect the words of the new job to go on from there.
    """
    drafts = {
        "s0-0": [words.draft("s0-0", [1, 2], attempt=2)],
        "s1-0": [words.draft("s1-0", [1, 2, 3])],
    }
    server.drafts = lambda job: drafts[job]
    server.run = lambda spec, job: words.written(job, [1, 2, 3, 4])
    server.drop_at, server.at_drop = {1}, server.forget
    stream = client.generate_stream("a")
    assert [piece.text for piece in stream] == [" 1 2", " 3", " 4"]
    assert stream.job_ids == (stream.result.job_id,) == ("s1-0",)
