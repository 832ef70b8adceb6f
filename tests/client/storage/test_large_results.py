"""Tensors that come through a store: a server's own for large results, and the caller's."""

from __future__ import annotations

import pickle
import threading
from pathlib import Path

import numpy as np
import pytest
import reltrace
from fake_results import LAYERS, relevance_of
from fake_server import FakeServer
from reltrace.storage import stored_arrays as stored
from reltrace.storage.stored_arrays import StoredArrays
from reltrace.transport.assemble import JobResult
from reltrace.transport.pending import Submission
from reltrace.transport.results import stream_results
from reltrace.transport.retry import Deadline
from reltrace.transport.submit import submit
from reltrace.types.request import Arguments, wire_priority
from reltrace_proto.v1 import types_pb2
from stored_results import Store

PROMPT = "My cats love"
TEXT = "<s> My cats love"


def expected(text: str = TEXT, site: str = "resid", trace: int = 0) -> np.ndarray:
    return relevance_of(text, site, (LAYERS, len(text.split())), trace)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: FakeServer) -> Store:
    """Whose results the server gives by manifest."""
    (tmp_path / "store").mkdir()
    store = Store(tmp_path / "store", monkeypatch)
    server.run = store.run
    server.results_url = store.folder.as_uri()
    return store


def test_a_large_result_is_the_callers_own(
    store: Store, client: reltrace.Client, tmp_path: Path
) -> None:
    """
    Given a result in a store, which the server empties once the result is acknowledged
    I expect a trace that needs it no more, also in a file and in another process.
    """
    trace = client.trace(PROMPT, sites=["resid", "embed"])
    store.clear()
    np.testing.assert_array_equal(trace["resid"], expected())
    assert trace.sites == ("resid", "embed")
    trace.save(tmp_path / "t.safetensors")
    for again in (
        pickle.loads(pickle.dumps(trace)),
        reltrace.Trace.load(tmp_path / "t.safetensors"),
    ):
        np.testing.assert_array_equal(again["resid"], trace["resid"])
        np.testing.assert_array_equal(again["embed"], trace["embed"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_store_changes_no_bit(
    store: Store, server: FakeServer, client: reltrace.Client, dtype: str
) -> None:
    stored = client.trace(PROMPT, dtype=dtype)
    server.run = None
    sent = client.trace(PROMPT, dtype=dtype)
    assert stored.relevance.dtype == sent.relevance.dtype
    assert stored.relevance.tobytes() == sent.relevance.tobytes()


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:{port}/a",
        "file:///etc/hostname",
        "file:///dev/zero",
        "{store}/../secret",
        "{store}/x::file://{secret}",
        "simplecache::file://{secret}",
        "{store}-of-others/x",
        "{store}/{long}/..",
    ],
)
def test_a_result_does_not_choose_what_is_opened(
    store: Store, server: FakeServer, client: reltrace.Client, url: str, tmp_path: Path
) -> None:
    """
    Given a worker that says its tensors are at a URL of its choice
    I expect the job to fail with that URL, nothing to be opened, and other jobs to go on; also
    where the caller has named a folder.
    """
    (tmp_path / "secret").write_bytes(bytes(1000))
    url = url.format(
        store=store.folder.as_uri(), secret=tmp_path / "secret", port=server.address.split(":")[1],
        long="x" * 5000,
    )  # fmt: skip

    def run(spec: types_pb2.JobSpec, job_id: str) -> list[types_pb2.ResultChunk]:
        (chunk,) = store.run(spec, job_id)
        if spec.prompt == "bad":
            chunk.manifest.url = url
        return [chunk]

    server.run = run
    for output_uri in (None, store.folder.as_uri()):
        good, bad = client.trace_many([PROMPT, "bad"], ordered=True, output_uri=output_uri)
        assert isinstance(bad, reltrace.Failure)
        assert isinstance(bad.error, reltrace.StoreUnreadable)
        assert "nothing was opened" in str(bad.error)
        assert url[:60] in str(bad.error)
        assert len(str(bad.error)) < 1000
        np.testing.assert_array_equal(good.relevance, expected())
    assert all(read.startswith(f"{store.folder.as_uri()}/s") for read in store.reads)


@pytest.mark.parametrize("announced", ["", "http://127.0.0.1:1/x", "simplecache::s3://bucket"])
def test_a_store_that_a_server_may_not_name(
    store: Store, server: FakeServer, client: reltrace.Client, announced: str
) -> None:
    server.results_url = announced
    with pytest.raises(reltrace.StoreUnreadable, match="nothing was opened"):
        client.trace(PROMPT)
    assert store.reads == []


@pytest.mark.parametrize(
    ("shape", "said"), [(None, f"says {1 << 40}"), ([LAYERS, 1 << 38], f"{LAYERS << 40} bytes")]
)
def test_a_manifest_that_says_other_lengths_or_that_is_larger_than_any(
    store: Store,
    server: FakeServer,
    client: reltrace.Client,
    shape: list[int] | None,
    said: str,
) -> None:
    def run(spec: types_pb2.JobSpec, job_id: str) -> list[types_pb2.ResultChunk]:
        (chunk,) = store.run(spec, job_id)
        chunk.manifest.length = 1 << 40
        if shape:
            chunk.manifest.length = LAYERS << 40
            chunk.manifest.tensors[0].shape[:] = shape
        return [chunk]

    server.run = run
    with pytest.raises(reltrace.ProtocolError, match=said):
        client.trace(PROMPT)
    assert store.reads == []


def test_several_targets_are_read_at_once(store: Store, client: reltrace.Client) -> None:
    targets = [reltrace.Target("cats"), 7, "max"]
    traces = client.trace(PROMPT, target=targets)
    for number, trace in enumerate(traces):
        np.testing.assert_array_equal(trace.relevance, expected(trace=number))
    assert len(store.reads) == 1


def test_a_store_that_can_not_be_read_names_url_and_job(
    store: Store, server: FakeServer, client: reltrace.Client
) -> None:
    def run(spec: types_pb2.JobSpec, job_id: str) -> list[types_pb2.ResultChunk]:
        chunks = store.run(spec, job_id)
        if spec.prompt == "gone":
            store.file(job_id).unlink()
        return chunks

    server.run = run
    with pytest.raises(reltrace.StoreUnreadable) as caught:
        client.trace("gone")
    assert store.file(str(caught.value.job_id)).as_uri() in str(caught.value)
    good, bad, last = client.trace_many([PROMPT, "gone", "a b"], ordered=True)
    assert isinstance(bad, reltrace.Failure)
    assert isinstance(bad.error, reltrace.StoreUnreadable)
    np.testing.assert_array_equal(good.relevance, expected())
    np.testing.assert_array_equal(last.relevance, expected("<s> a b"))


async def test_what_is_read_is_counted_and_waits_for_room(store: Store, server: FakeServer) -> None:
    """
    Given results in a store, and a caller who says when there is room
    I expect each to be read after there was, and to be counted with all its bytes.
    """
    jobs = [Arguments(f"p {number}", sites=["resid"]).job() for number in range(4)]
    events: list[str] = []

    async def room() -> None:
        events.append("room")

    async with reltrace.AsyncClient(server.address) as client:
        deadline = Deadline(20)
        priority = wire_priority("interactive")
        accepted = await submit(client._connection, jobs, deadline, priority)
        assert isinstance(accepted, Submission)
        found: list[JobResult] = []
        async for result in stream_results(
            client._connection, accepted, jobs, deadline, throttle=room
        ):
            events.append(f"read {len(store.reads)}")
            found.append(result)
    assert [result.bytes for result in found] == [LAYERS * 3 * 4] * 4
    for number in range(1, 5):
        assert events[events.index(f"read {number}") - 1] == "room"


def test_a_time_that_is_over_ends_the_reading_too(
    store: Store, server: FakeServer, client: reltrace.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()
    monkeypatch.setattr(stored, "_read", lambda place: release.wait(20) and b"")
    try:
        with pytest.raises(reltrace.DeadlineExceeded):
            client.trace(PROMPT, timeout=0.5)
    finally:
        release.set()


def test_tensors_in_the_callers_store_are_read_when_looked_at(
    store: Store, server: FakeServer, client: reltrace.Client
) -> None:
    uri = (store.folder).as_uri()
    traces = list(client.trace_many([PROMPT, "a b"], ordered=True, output_uri=f"{uri}/"))
    assert [spec.output_uri for spec in server.requests[0].jobs] == [uri, uri]
    assert store.reads == []
    assert all(isinstance(trace.arrays, StoredArrays) for trace in traces)
    np.testing.assert_array_equal(traces[1].relevance, expected("<s> a b"))
    assert len(store.reads) == 1
    store.clear()
    # What was read stays; what was not says where it should have been.
    np.testing.assert_array_equal(traces[1].relevance, expected("<s> a b"))
    with pytest.raises(reltrace.StoreUnreadable, match=traces[0].arrays.location.url):
        traces[0].relevance  # noqa: B018


def test_an_item_may_have_a_store_of_its_own(
    store: Store, server: FakeServer, client: reltrace.Client
) -> None:
    uri = store.folder.as_uri()
    items = [{"prompt": PROMPT, "output_uri": uri}, "a b"]
    own, other = client.trace_many(items, ordered=True)
    assert isinstance(own.arrays, StoredArrays)
    assert not isinstance(other.arrays, StoredArrays)


@pytest.mark.parametrize("uri", ["/srv/traces", "traces", "s3://", "S3 bucket", "", 7])
def test_a_store_that_is_no_url_is_refused(client: reltrace.Client, uri: object) -> None:
    with pytest.raises(reltrace.InvalidArgument, match="output_uri: must "):
        client.trace_many([PROMPT], output_uri=uri)  # type: ignore[arg-type]
    (failure,) = client.trace_many([{"prompt": PROMPT, "output_uri": uri}])
    assert isinstance(failure, reltrace.Failure)
    assert "output_uri: must " in str(failure.error)


def test_a_manifest_of_what_was_not_asked_for_is_an_error(
    store: Store, server: FakeServer, client: reltrace.Client
) -> None:
    def run(spec: types_pb2.JobSpec, job_id: str) -> list[types_pb2.ResultChunk]:
        (chunk,) = store.run(spec, job_id)
        chunk.manifest.tensors[0].site = "moon"
        return [chunk]

    server.run = run
    with pytest.raises(reltrace.TraceError, match="site 'moon' was not asked for"):
        client.trace(PROMPT)


def test_a_manifest_that_leaves_a_site_out_is_an_error(
    store: Store, server: FakeServer, client: reltrace.Client
) -> None:
    def run(spec: types_pb2.JobSpec, job_id: str) -> list[types_pb2.ResultChunk]:
        (chunk,) = store.run(spec, job_id)
        del chunk.manifest.tensors[:]
        return [chunk]

    server.run = run
    with pytest.raises(reltrace.TraceError, match="trace 0 came back without site 'resid'"):
        client.trace(PROMPT)
