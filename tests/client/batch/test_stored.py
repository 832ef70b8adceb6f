"""Batches whose tensors come through a store, or stay in one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import grpc
import numpy as np
import pytest
import reltrace
from fake_results import relevance_of
from fake_server import FakeServer, status_with
from reltrace.batch.run import Summary
from reltrace.calls.source import open_source
from reltrace.storage.stored_arrays import StoredArrays
from reltrace.storage.trace_files import split
from reltrace_proto.v1 import types_pb2
from safetensors.numpy import save_file
from stored_results import Store

Batch = Callable[..., Summary]

LINES = [f"prompt {number} {'x ' * (number % 3)}" for number in range(40)]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: FakeServer) -> Store:
    (tmp_path / "store").mkdir()
    store = Store(tmp_path / "store", monkeypatch)
    server.run = store.run
    server.results_url = store.folder.as_uri()
    return store


def check(folder: Path, lines: list[str] = LINES) -> None:
    loaded = reltrace.load_batch(folder)
    assert [trace.id for trace in loaded] == list(range(len(lines)))
    for trace, line in zip(loaded, lines, strict=True):
        text = " ".join(["<s>", *line.split()])
        np.testing.assert_array_equal(
            trace.relevance, relevance_of(text, "resid", trace.relevance.shape)
        )


@pytest.mark.parametrize("part_format", ["safetensors", "parquet"])
def test_large_results_are_in_the_folder(
    batch: Batch, store: Store, tmp_path: Path, part_format: str
) -> None:
    """
    Given a server that gives large results through a store of its own, and empties it later
    I expect a batch that did not ask for that to hold its tensors itself.
    """
    assert batch(LINES, format=part_format, part_traces=7).traced == 40
    store.clear()
    check(tmp_path / "out")


@pytest.mark.parametrize("part_format", ["safetensors", "parquet"])
def test_tensors_stay_where_the_batch_wants_them(
    batch: Batch, store: Store, server: FakeServer, tmp_path: Path, part_format: str
) -> None:
    """
    Given a batch with an output_uri
    I expect no tensor to be read while it runs, its folder to say where they are, and each to be
    read from there when it is looked at.
    """
    uri = store.folder.as_uri()
    assert batch(LINES, format=part_format, part_traces=7, output_uri=uri).traced == 40
    assert {spec.output_uri for request in server.requests for spec in request.jobs} == {uri}
    assert store.reads == []
    loaded = reltrace.load_batch(tmp_path / "out")
    assert isinstance(loaded[3].arrays, StoredArrays)
    assert loaded[3].tokens == ["<s>", *LINES[3].split()]
    assert loaded.manifest["settings"]["output_uri"] == uri
    assert store.reads == []
    check(tmp_path / "out")
    assert len(store.reads) == 40
    rows = list(loaded.rows())
    np.testing.assert_array_equal(rows[5]["resid"], loaded[5].relevance)


@pytest.mark.parametrize("part_format", ["safetensors", "parquet"])
def test_a_strangers_folder_does_not_choose_what_is_opened(
    batch: Batch, store: Store, part_format: str, tmp_path: Path
) -> None:
    """
    Given a batch whose manifest was changed, so that its tensors are in another folder, or in one
    of a kind that the caller did not name
    I expect nothing to be opened, unless the caller names the folder.
    """
    uri = store.folder.as_uri()
    batch(LINES[:3], format=part_format, output_uri=uri)
    manifest = tmp_path / "out" / "manifest.json"
    text = manifest.read_text()
    for other in ("http://127.0.0.1:1/x", f"{uri}/deeper", f"simplecache::{uri}", ""):
        manifest.write_text(text.replace(uri, other))
        loaded = reltrace.load_batch(tmp_path / "out")
        with pytest.raises(reltrace.StoreUnreadable, match="nothing was opened"):
            loaded[0]
        named = reltrace.load_batch(tmp_path / "out", output_uri=f"{uri}/")
        assert named[0].relevance.shape == (4, 3)
    assert len(store.reads) == 4
    with pytest.raises(reltrace.InvalidArgument, match="output_uri: must be one plain URL"):
        reltrace.load_batch(tmp_path / "out", output_uri=f"{uri}::{uri}")


def test_a_single_trace_has_its_tensors_with_it(batch: Batch, store: Store, tmp_path: Path) -> None:
    """
    Given a file that says that it was written by Trace.save, and that its tensors are elsewhere
    I expect nothing to be opened.
    """
    batch(LINES[:1], output_uri=store.folder.as_uri())
    trace = reltrace.load_batch(tmp_path / "out")[0]
    about, _ = split(trace, copy_stored=False)
    metadata = {"format": "reltrace-trace-1", "trace": json.dumps(about)}
    save_file({}, tmp_path / "t.safetensors", metadata)
    with pytest.raises(reltrace.StoreUnreadable, match="nothing was opened"):
        reltrace.Trace.load(tmp_path / "t.safetensors")
    assert store.reads == []


def test_several_targets_stay_there_too(batch: Batch, store: Store, tmp_path: Path) -> None:
    batch(LINES[:3], target=["cats", 7], output_uri=store.folder.as_uri())
    loaded = reltrace.load_batch(tmp_path / "out")
    assert len(loaded) == 6
    for number, trace in enumerate(loaded):
        text = " ".join(trace.tokens)
        expected = relevance_of(text, "resid", trace.relevance.shape, number % 2)
        np.testing.assert_array_equal(trace.relevance, expected)


def test_an_interrupted_batch_goes_on(
    batch: Batch,
    store: Store,
    server: FakeServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """
    Given a batch with an output_uri that breaks off in the middle
    If it is called again
    I expect only what is missing to be traced, and every tensor to be found.
    """

    def broken_off(spec: types_pb2.JobSpec) -> None:
        if spec.prompt == LINES[20]:
            server.stream_errors.extend([status_with(grpc.StatusCode.PERMISSION_DENIED, "no")] * 9)
            server.drop_at = {server.sent + 1}

    # All prompts in one submission: those of several are read side by side.
    read_ahead = "reltrace.calls.trace_many.open_source"
    monkeypatch.setattr(read_ahead, lambda items: open_source(list(items)))
    uri = store.folder.as_uri()
    server.hold = broken_off
    with pytest.raises(reltrace.PermissionDenied):
        batch(LINES, output_uri=uri)
    assert len(reltrace.load_batch(tmp_path / "out")) == 20
    server.hold = lambda spec: None
    server.stream_errors.clear()
    assert batch(LINES, output_uri=uri).new == 20
    check(tmp_path / "out")


def test_another_store_is_another_batch(batch: Batch, store: Store) -> None:
    uri = store.folder.as_uri()
    batch(LINES, output_uri=uri, limit=3)
    with pytest.raises(reltrace.InvalidArgument, match=f"output_uri was '{uri}' and is None"):
        batch(LINES)


def test_tensors_that_are_gone_cost_no_others(batch: Batch, store: Store, tmp_path: Path) -> None:
    batch(LINES[:3], output_uri=store.folder.as_uri())
    loaded = reltrace.load_batch(tmp_path / "out")
    place = loaded[1].arrays.location
    Path(place.url.removeprefix("file://")).unlink()
    with pytest.raises(reltrace.StoreUnreadable, match=place.url):
        loaded[1].relevance  # noqa: B018
    assert loaded[1].target.token == "dogs"
    assert loaded[2].relevance.shape == (4, 5)
