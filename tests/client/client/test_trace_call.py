"""`Client.trace`: one prompt, against a server that behaves and one that does not."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
import reltrace
from fake_results import LAYERS, failed_chunk, relevance_of
from fake_server import FakeServer, queue_full, status_with
from google.rpc import code_pb2
from reltrace_proto.v1 import types_pb2

PROMPT = "My cats love to play with my"
TOKENS = ["<s>", *PROMPT.split()]
TEXT = " ".join(TOKENS)


def expected(site: str = "resid", trace: int = 0) -> np.ndarray:
    shape = (len(TOKENS),) if site == "embed" else (LAYERS, len(TOKENS))
    return relevance_of(TEXT, site, shape, trace)


def test_a_prompt_comes_back_as_a_trace(server: FakeServer, client: reltrace.Client) -> None:
    trace = client.trace(PROMPT)
    assert trace.tokens == TOKENS
    assert trace.token_ids == list(range(len(TOKENS)))
    assert (trace.target.token, trace.target.token_id) == ("dogs", 7)
    assert trace.target.logit == 3.5
    assert trace.target.position == len(TOKENS) - 1
    assert trace.relevance.dtype == np.float32
    np.testing.assert_array_equal(trace.relevance, expected())
    assert trace.provenance.versions == {"lxt": "2.1", "torch": "2.13.0"}
    assert trace.id is None
    server.wait_acknowledged()


def test_the_defaults_are_on_the_wire(server: FakeServer, client: reltrace.Client) -> None:
    client.trace(PROMPT)
    (spec,) = server.requests[0].jobs
    assert spec == types_pb2.JobSpec(
        prompt=PROMPT,
        sites=["resid"],
        reduction="token",
        targets=[types_pb2.Target()],
        rule="attnlrp",
        dtype=types_pb2.SCALAR_TYPE_FLOAT32,
    )


def test_several_sites_in_small_pieces(server: FakeServer, client: reltrace.Client) -> None:
    server.piece_bytes = 5  # not a multiple of the element size
    trace = client.trace(PROMPT, sites=["embed", "resid"])
    assert trace.sites == ("embed", "resid")
    np.testing.assert_array_equal(trace["embed"], expected("embed"))
    np.testing.assert_array_equal(trace["resid"], expected())


def test_a_broken_stream_goes_on_where_it_broke(
    server: FakeServer, client: reltrace.Client
) -> None:
    server.piece_bytes = 7
    server.drop_at = {3, 4, 9}
    np.testing.assert_array_equal(client.trace(PROMPT).relevance, expected())
    assert [stream.after_chunk for stream in server.streams] == [0, 2, 2, 6]
    assert {stream.after_entry for stream in server.streams} == {0}


def test_a_server_that_is_started_again_goes_on(
    server: FakeServer, client: reltrace.Client
) -> None:
    client.trace("connected")
    waiting, go_on = threading.Event(), threading.Event()
    server.hold = lambda spec: (waiting.set(), go_on.wait(10), None)[2]
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(client.trace, PROMPT)
        assert waiting.wait(10)
        server.stop()
        go_on.set()
        server.start()
        np.testing.assert_array_equal(call.result(20).relevance, expected())
    assert server.jobs_submitted() == 2


def test_a_server_that_comes_late_is_waited_for(server: FakeServer) -> None:
    server.stop()
    with reltrace.Client(server.address) as client, ThreadPoolExecutor(1) as pool:
        call = pool.submit(client.trace, PROMPT)
        with pytest.raises(TimeoutError):
            call.result(0.3)
        server.start()
        np.testing.assert_array_equal(call.result(20).relevance, expected())


def test_a_lost_answer_is_asked_for_again_with_the_same_key(
    server: FakeServer, client: reltrace.Client
) -> None:
    server.lose_answer = True
    server.submit_errors.append(status_with(grpc.StatusCode.UNAVAILABLE, "starting"))
    client.trace(PROMPT)
    assert len({request.idempotency_key for request in server.requests}) == 1
    assert len(server.requests) == 3
    assert server.jobs_submitted() == 1


def test_a_full_queue_is_waited_for(server: FakeServer, client: reltrace.Client) -> None:
    server.submit_errors += [queue_full(0.02), queue_full(0.02)]
    client.trace(PROMPT)
    assert len(server.requests) == 3


def test_a_full_queue_without_a_delay_is_an_error(
    server: FakeServer, client: reltrace.Client
) -> None:
    server.submit_errors.append(status_with(grpc.StatusCode.RESOURCE_EXHAUSTED, "too large"))
    with pytest.raises(reltrace.ResourceExhausted, match="can not accept the request: too large"):
        client.trace(PROMPT)


def test_no_server_says_so_with_the_address() -> None:
    with (
        reltrace.Client("127.0.0.1:1", retry_timeout=0.2) as client,
        pytest.raises(reltrace.Unavailable, match=r"127\.0\.0\.1:1.*reltrace up"),
    ):
        client.trace(PROMPT)


def test_the_timeout_ends_a_call_that_waits(server: FakeServer, client: reltrace.Client) -> None:
    ended = threading.Event()
    server.hold = lambda spec: (ended.wait(5), None)[1]
    with pytest.raises(reltrace.DeadlineExceeded, match=r"timeout of 0\.2 s$") as caught:
        client.trace(PROMPT, timeout=0.2)
    ended.set()
    assert isinstance(caught.value, TimeoutError)


def test_the_timeout_ends_a_wait_for_a_full_queue(
    server: FakeServer, client: reltrace.Client
) -> None:
    server.submit_errors += [queue_full(30)]
    with pytest.raises(reltrace.DeadlineExceeded):
        client.trace(PROMPT, timeout=0.2)


@pytest.mark.parametrize(
    ("dtype", "numpy_dtype"),
    [("float32", np.float32), ("float16", np.float16), ("bfloat16", np.float32)],
)
def test_number_formats(client: reltrace.Client, dtype: str, numpy_dtype: type) -> None:
    values = client.trace(PROMPT, dtype=dtype).relevance
    assert values.dtype == numpy_dtype
    if dtype == "bfloat16":
        exact = expected().view(np.uint32) & np.uint32(0xFFFF0000)
        np.testing.assert_array_equal(values, exact.view(np.float32))
    else:
        np.testing.assert_array_equal(values, expected().astype(numpy_dtype))


def test_a_list_of_targets_gives_a_list(client: reltrace.Client) -> None:
    traces = client.trace(PROMPT, target=["cats", 5, reltrace.Target(logprob=True)])
    assert len(traces) == 3
    assert [trace.target.logprob for trace in traces] == [False, False, True]
    for index, trace in enumerate(traces):
        np.testing.assert_array_equal(trace.relevance, expected(trace=index))


def test_a_list_of_one_target_gives_a_list_of_one(client: reltrace.Client) -> None:
    assert len(client.trace(PROMPT, target=["cats"])) == 1


def test_each_response_token_gives_a_list(client: reltrace.Client) -> None:
    traces = client.trace(PROMPT, target=[reltrace.Target(continuation=[1, 2, 3], each=True)])
    assert [trace.target.logit for trace in traces] == [3.5, 4.5, 5.5]
    single = client.trace(PROMPT, target=reltrace.Target(continuation=[1, 2], each=True))
    assert isinstance(single, list)
    assert len(single) == 2


def test_input_ids(server: FakeServer, client: reltrace.Client) -> None:
    assert client.trace(input_ids=np.array([3, 1, 2])).tokens == ["<3>", "<1>", "<2>"]


def test_the_schedulers_fault_has_the_callers_name(
    server: FakeServer, client: reltrace.Client
) -> None:
    server.faults = lambda spec: [("reduction", "must be token"), ("targets[0].token", "no")]
    with pytest.raises(reltrace.InvalidArgument, match="reduce: must be token; target: no") as got:
        client.trace(PROMPT, target="cats")
    assert [v.field for v in got.value.violations] == ["reduce", "target"]
    with pytest.raises(reltrace.InvalidArgument, match=r"target\[0\]\.token: no"):
        client.trace(PROMPT, target=[reltrace.Target("cats")])


def test_an_unknown_model(server: FakeServer, client: reltrace.Client) -> None:
    server.rejection = grpc.StatusCode.NOT_FOUND
    server.faults = lambda spec: [("model", "'x' is not served; served: fake")]
    with pytest.raises(reltrace.ModelNotFound, match="model: 'x' is not served; served: fake"):
        client.trace(PROMPT, model="x")


@pytest.mark.parametrize(
    ("state", "code", "field", "error"),
    [
        (types_pb2.JOB_STATE_FAILED, code_pb2.INVALID_ARGUMENT, "prompt", reltrace.InvalidArgument),
        (types_pb2.JOB_STATE_FAILED, code_pb2.NOT_FOUND, "model", reltrace.ModelNotFound),
        (types_pb2.JOB_STATE_FAILED, code_pb2.INTERNAL, "", reltrace.JobFailed),
        (types_pb2.JOB_STATE_FAILED, code_pb2.RESOURCE_EXHAUSTED, "", reltrace.ResourceExhausted),
        (types_pb2.JOB_STATE_CANCELLED, code_pb2.CANCELLED, "", reltrace.Cancelled),
        (types_pb2.JOB_STATE_QUARANTINED, code_pb2.ABORTED, "", reltrace.Quarantined),
    ],
)
def test_a_job_that_ends_badly(
    server: FakeServer,
    client: reltrace.Client,
    state: int,
    code: int,
    field: str,
    error: type[reltrace.TraceError],
) -> None:
    server.run = lambda spec, job_id: [failed_chunk(job_id, state, code, "it broke", field)]
    with pytest.raises(error, match="it broke") as caught:
        client.trace(PROMPT)
    assert type(caught.value) is error
    server.wait_acknowledged()


def test_a_stream_that_ends_early_is_an_error(server: FakeServer, client: reltrace.Client) -> None:
    server.truncate = True
    with pytest.raises(reltrace.ProtocolError, match="1 of 1 missing"):
        client.trace(PROMPT)


def test_expired_results(server: FakeServer, client: reltrace.Client) -> None:
    server.stream_errors += [status_with(grpc.StatusCode.NOT_FOUND, "submission has expired")] * 4
    with pytest.raises(reltrace.NotFound, match="expired"):
        client.trace(PROMPT)


def test_a_server_of_another_kind() -> None:
    other = grpc.server(ThreadPoolExecutor(2))
    port = other.add_insecure_port("127.0.0.1:0")
    other.start()
    try:
        with (
            reltrace.Client(f"127.0.0.1:{port}") as client,
            pytest.raises(reltrace.ProtocolError, match="is it a reltrace server"),
        ):
            client.trace(PROMPT)
    finally:
        other.stop(None).wait(5)


def test_a_timeout_without_a_server_says_so() -> None:
    with (
        reltrace.Client("127.0.0.1:1") as client,
        pytest.raises(reltrace.DeadlineExceeded, match=r"timeout of 0\.5 s: .* at 127\.0\.0\.1:1"),
    ):
        client.trace("a", timeout=0.5)


def test_an_acknowledgement_goes_on_when_nobody_waits_for_it(
    server: FakeServer, client: reltrace.Client
) -> None:
    """
    Given a store that is away just when a result has come
    If it is away for longer than a caller is kept waiting for the acknowledgement
    I expect the trace at once, and the result to be acknowledged when the store is back.
    """
    server.acknowledge_errors = 5
    assert client.trace(PROMPT).tokens == TOKENS
    assert not server.acknowledged
    server.wait_acknowledged(10)
    assert server.acknowledge_errors == 0
