"""A batch against the real service: killed, taken up again, and equal to single traces."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import reltrace
from demo_model.corpus import held_out
from e2e.conftest import wait_until
from reltrace_worker.demo import DEMO_MODEL

COUNT = 1500


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("batch") / "prompts.jsonl"
    rows = [{"id": f"s{i}", "prompt": one.prompt} for i, one in enumerate(held_out(COUNT, 0))]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def start(source: Path, out: Path, address: str, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "reltrace", "batch", str(source), str(out), "--server", address,
         "--model", DEMO_MODEL, "--quiet", "--json", "--part-traces", "128", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip


def traced(out: Path) -> int:
    return len(reltrace.load_batch(out)) if (out / "journal.sqlite").exists() else 0


@pytest.mark.parametrize("part_format", ["safetensors", "parquet"])
def test_a_batch_that_is_killed_gives_every_trace_once(
    source: Path, address: str, client: reltrace.Client, tmp_path: Path, part_format: str
) -> None:
    out = tmp_path / "out"
    first = start(source, out, address, "--format", part_format)
    try:
        wait_until(lambda: traced(out), "the first commit", 60)
    finally:
        first.kill()
        first.communicate()
    before = len(reltrace.load_batch(out))
    assert 0 < before < COUNT

    second = start(source, out, address, "--format", part_format)
    said, errors = second.communicate(timeout=90)
    assert second.returncode == 0, errors
    summary = json.loads(said)
    assert (summary["traced"], summary["failed"], summary["new"]) == (COUNT, 0, COUNT - before)

    batch = reltrace.load_batch(out)
    assert [trace.id for trace in batch] == [f"s{number}" for number in range(COUNT)]
    prompts = [json.loads(line)["prompt"] for line in source.read_text().splitlines()]
    for number in range(0, COUNT, 150):
        alone = client.trace(prompts[number], model=DEMO_MODEL)
        assert batch[number].tokens == alone.tokens
        assert batch[number].target.token_id == alone.target.token_id
        # Packed with others, sums are made in another order.
        scale = np.abs(alone.relevance).max(axis=1, keepdims=True)
        np.testing.assert_allclose(
            batch[number].relevance / scale, alone.relevance / scale, atol=1e-5
        )


def test_jobs_of_a_killed_batch_do_not_go_first(
    address: str, client: reltrace.Client, tmp_path: Path
) -> None:
    """
    Given a batch of more work than the service does while this test runs
    If it is killed and called again
    I expect none of its former jobs to be left when the first trace comes, and after Ctrl-C none
    at all.
    """
    tokens = next(m.context_length for m in client.models() if m.name == DEMO_MODEL)
    ids = np.random.default_rng(3).integers(10, 200, (512, tokens)).tolist()
    source, out = tmp_path / "long.jsonl", tmp_path / "out"
    source.write_text("".join(json.dumps({"input_ids": one}) + "\n" for one in ids))
    held = out / "submissions.json"
    first = start(source, out, address)
    try:
        wait_until(held.exists, "jobs on the server", 60)
    finally:
        first.kill()
        first.communicate()
    left = json.loads(held.read_text())
    assert left

    second = start(source, out, address, "--part-seconds", "0.1")
    try:
        wait_until(lambda: traced(out), "the first commit", 60)
        jobs = [f"{name}-{number}" for name, count in left.items() for number in range(count)]
        # Cancelled, and their results freed.
        assert {job.state for job in client.jobs(*jobs)} == {None}
        now = json.loads(held.read_text())
        assert now
        assert not now.keys() & left.keys()
        second.send_signal(signal.SIGINT)
        _, errors = second.communicate(timeout=30)
    finally:
        second.kill()
        second.communicate()
    assert second.returncode == 130, errors
    wait_until(lambda: sum(q.queued + q.leased for q in client.status().queues) == 0, "rest", 10)
    assert not held.exists()


def test_the_service_is_left_clean(source: Path, address: str, client: reltrace.Client) -> None:
    """What a killed batch left on its way ends by itself, and nothing of it waits for ever."""
    wait_until(lambda: sum(q.queued + q.leased for q in client.status().queues) == 0, "rest", 60)
