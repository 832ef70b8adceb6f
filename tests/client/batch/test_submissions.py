"""What a batch has on the server: cancelled by the run after one that was killed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import reltrace
from batch.written import LINES, Batch, check
from fake_server import FakeServer
from reltrace_proto.v1 import types_pb2


def test_what_the_server_holds_is_noted_while_it_does(
    batch: Batch, server: FakeServer, tmp_path: Path
) -> None:
    path = tmp_path / "out" / "submissions.json"
    seen: list[dict[str, int]] = []

    def look(spec: types_pb2.JobSpec) -> None:
        seen.append(json.loads(path.read_text()))

    server.hold = look
    batch(LINES)
    assert all(seen)
    assert {name: count for one in seen for name, count in one.items()} == {
        submission.id: len(submission.specs) for submission in server.submissions.values()
    }
    assert not path.exists()


def test_what_a_killed_run_left_is_cancelled_before_anything_is_sent(
    batch: Batch, server: FakeServer, tmp_path: Path
) -> None:
    """
    Given a batch that was killed while the server had two submissions of it
    If it is called again
    I expect the one that the server still knows to be cancelled and freed first, and the other,
    which it has forgotten, to be no matter.
    """
    batch(LINES[:5])
    with reltrace.Client(server.address) as client:
        list(client.trace_many(["a", "b"]))
    name, submission = list(server.submissions.items())[-1]
    for job in submission.job_ids:
        # As if the job had not ended, and its result had not been read.
        del server.ended[job]
    del server.acknowledged[name]
    note = tmp_path / "out" / "submissions.json"
    note.write_text(json.dumps({name: 2, "forgotten": 3}))
    order: list[str] = []
    server.before = order.append
    batch(LINES)
    server.wait_cancelled(*submission.job_ids)
    assert server.acknowledged[name] == 2
    assert order.index("CancelJobs") < order.index("SubmitJobs")
    assert not note.exists()
    check(tmp_path / "out", LINES)


def test_a_note_that_is_damaged_is_none(batch: Batch, server: FakeServer, tmp_path: Path) -> None:
    batch(LINES[:5])
    (tmp_path / "out" / "submissions.json").write_bytes(b"")
    batch(LINES)
    check(tmp_path / "out", LINES)
    assert server.cancelled == []


def test_a_batch_goes_on_with_the_revision_that_it_began_with(
    batch: Batch, server: FakeServer, tmp_path: Path
) -> None:
    """
    Given a batch that was begun before a second revision of its model came
    I expect it to ask for the first one, also for prompts that name the model themselves, and
    another batch to be told that there are two.
    """
    lines = [json.dumps({"prompt": line}) for line in LINES]
    batch(lines[:10], input_format="jsonl")
    server.served = [("fake", "r2", 1), ("fake", "r1", 1)]
    lines += [json.dumps({"prompt": "own", "model": "fake"})]
    batch(lines, input_format="jsonl")
    specs = [spec for sent in server.submissions.values() for spec in sent.specs]
    assert {spec.model for spec in specs} == {"fake@r1"}
    assert len(reltrace.load_batch(tmp_path / "out")) == len(lines)
    with pytest.raises(
        reltrace.InvalidArgument,
        match="served in 2 revisions; ask for one of them as NAME@REVISION: fake@r2, fake@r1",
    ):
        batch(LINES, out="new")


def test_a_batch_of_a_revision_that_is_not_served_is_refused_at_once(
    batch: Batch, server: FakeServer
) -> None:
    batch(LINES[:10])
    server.served = [("fake", "r2", 1)]
    count = len(server.submissions)
    with pytest.raises(reltrace.TraceError, match=r"revision is 'r2', and this batch was .* 'r1'"):
        batch(LINES)
    assert len(server.submissions) == count
    # Nobody serves it: a worker may be starting.
    server.served = [("fake", "r2", 0)]
    assert batch(LINES).traced == len(LINES)
