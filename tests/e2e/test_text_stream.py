"""Reading along where things break or are left: nothing stays behind, and every text is right."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
import redis
import reltrace
from e2e.conftest import Process, wait_until
from reference.checkpoints import Recipe, save_checkpoint
from reltrace_proto.v1 import trace_pb2, trace_pb2_grpc, types_pb2

PROMPT = "I have 5 cats and 3 dogs. My cats love to play with my"
LONG = 600
"""Tokens: seconds of writing, far longer than anything here takes to look."""

SLOW = Recipe(seed=11, layers=32, context_length=2048)
"""Its tokens are bytes, mostly, and make no sense: half characters are everywhere."""


@dataclass
class Service:
    """A scheduler, a worker, and the Redis behind them."""

    address: str
    store: redis.Redis

    def drafts(self) -> int:
        """Count the keys of drafts."""
        return len(list(self.store.scan_iter("reltrace:*:draft:*")))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    path = save_checkpoint(tmp_path_factory.mktemp("slow") / "slow", SLOW)
    return ("--model", str(path), "--threads", "1")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, model: tuple[str, ...]) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("service")
    scheduler = Process.start(
        folder, "reltrace_scheduler", "--data", str(folder / "data"), "--listen", "127.0.0.1:0"
    )
    address = scheduler.first_line().split()[-1]
    worker = Process.start(folder, "reltrace_worker", "--scheduler", address, *model)
    (socket,) = (folder / "data").rglob("redis.sock")
    try:
        with (
            redis.Redis(unix_socket_path=str(socket)) as store,
            reltrace.Client(address, retry_timeout=100) as client,
        ):
            wait_until(lambda: len(client.models()) == 1, "the model is served", 100)
            yield Service(address, store)
    finally:
        worker.stop()
        scheduler.stop()


def joined(pieces: list[reltrace.TextPiece]) -> str:
    assert not any(piece.again for piece in pieces)
    return "".join(piece.text for piece in pieces)


def tokens(pieces: list[reltrace.TextPiece]) -> int:
    return sum(len(piece.token_ids) for piece in pieces)


@pytest.mark.parametrize("way", ["read", "closed", "forgotten", "cancelled", "out of time"])
def test_nothing_of_a_text_is_left_in_redis(service: Service, way: str) -> None:
    """
    Given a text in the middle, with what it has written in Redis
    I expect none of that to be left once the text is read to its end, left early, cancelled by
    somebody else, or out of its time.
    """
    with reltrace.Client(service.address) as client:
        ended = sum(client.status().ended.values())
        stream = client.generate_stream(
            PROMPT,
            max_new_tokens=100 if way == "read" else LONG,
            timeout=2.0 if way == "out of time" else None,
        )
        first = next(stream)
        (key,) = service.store.scan_iter("reltrace:*:draft:*")
        match way:
            case "read":
                assert joined([first, *stream]) == stream.result.text  # type: ignore[union-attr]
            case "closed":
                stream.close()
            case "forgotten":
                del stream
            case "cancelled":
                assert client.cancel(key.decode().rpartition(":")[2]) == 1
                with pytest.raises(reltrace.Cancelled):
                    list(stream)
            case "out of time":
                with pytest.raises(reltrace.DeadlineExceeded):
                    list(stream)
        wait_until(lambda: sum(client.status().ended.values()) == ended + 1, "the job ended", 20)
        assert service.drafts() == 0


def test_a_text_that_nobody_reads_along_with_is_not_drafted(service: Service) -> None:
    """
    Given two texts that are written together, and somebody who wants to read along with both
    I expect drafts of the one that asked for it alone; and of who does not ask for drafts, that
    nothing but results comes.
    """
    with grpc.insecure_channel(service.address) as channel:
        stub = trace_pb2_grpc.TraceServiceStub(channel)
        jobs = [
            types_pb2.JobSpec(
                prompt=PROMPT, generation=types_pb2.Generation(max_new_tokens=30, stream=stream)
            )
            for stream in (True, False)
        ]
        answer = stub.SubmitJobs(trace_pb2.SubmitJobsRequest(idempotency_key="k", jobs=jobs))
        along, results = (
            list(
                stub.StreamResults(
                    trace_pb2.StreamResultsRequest(
                        submission_id=answer.submission_id, drafts_of=drafts_of
                    ),
                    timeout=60,
                )
            )
            for drafts_of in (answer.job_ids, ())
        )
        stub.AcknowledgeResults(
            trace_pb2.AcknowledgeResultsRequest(submission_id=answer.submission_id, through_entry=2)
        )
    assert {draft.job_id for message in along for draft in message.drafts} == {answer.job_ids[0]}
    for messages in (along, results):
        assert sum(len(message.events) for message in messages) == 2
    assert not any(message.drafts for message in results)


@pytest.mark.slow
def test_reader_and_worker_go_on_when_their_scheduler_dies(
    start: Callable[..., Process], tmp_path: Path, model: tuple[str, ...]
) -> None:
    """
    Given two schedulers on one Redis, and client and worker at the first
    If that is killed in mid-text
    I expect both to go on at the other, long before the text has ended, and every piece once.
    """
    store = ("--data", str(tmp_path / "data"))
    keeper = start("reltrace_scheduler", *store, "--listen", "127.0.0.1:0")
    last = keeper.first_line().split()[-1]
    (socket,) = (tmp_path / "data").rglob("redis.sock")
    first = start("reltrace_scheduler", "--redis", f"unix://{socket}", "--listen", "127.0.0.1:0")
    address = first.first_line().split()[-1]
    worker = start("reltrace_worker", "--scheduler", f"{address},{last}", *model)
    with (
        reltrace.Client(last, retry_timeout=100) as other,
        reltrace.Client(f"{address},{last}", retry_timeout=100) as client,
    ):
        wait_until(lambda: len(other.models()) == 1, "the model is served", 100)
        expected = other.generate(PROMPT, max_new_tokens=LONG).text
        stream = client.generate_stream(PROMPT, max_new_tokens=LONG)
        pieces = [next(stream)]
        first.kill()
        known = tokens(pieces)
        while tokens(pieces) < known + 100:
            pieces.append(next(stream))
        # That many can not have been on their way, and a result would have ended the job.
        assert sum(queue.leased for queue in other.status().queues) == 1
        pieces += list(stream)
        assert joined(pieces) == expected
    assert worker.popen.poll() is None


def on_a_terminal(*arguments: str) -> tuple[subprocess.Popen[bytes], int]:
    """Start the command with a terminal of its own; return that too."""
    ours, its = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "reltrace", *arguments], stdout=its, stderr=subprocess.PIPE
    )
    os.close(its)
    return process, ours


def read(terminal: int) -> bytes:
    """Read what a terminal shows; empty at its end."""
    try:
        return os.read(terminal, 1 << 16)
    except OSError:  # Linux says so when the other side is gone.
        return b""


def test_the_command_writes_along_on_a_terminal_and_not_into_a_pipe(service: Service) -> None:
    asked = ("generate", PROMPT, "--max-new-tokens", "30", "--server", service.address)
    with reltrace.Client(service.address) as client:
        expected = client.generate(PROMPT, max_new_tokens=30).text
    process, terminal = on_a_terminal(*asked)
    said = b"".join(iter(lambda: read(terminal), b""))
    os.close(terminal)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert said.decode().replace("\r\n", "\n") == expected + "\n"
    piped = subprocess.run(
        [sys.executable, "-m", "reltrace", *asked], capture_output=True, timeout=60, check=True
    )
    assert piped.stdout.decode() == expected + "\n"


def test_who_interrupts_the_command_cancels_the_text(service: Service) -> None:
    """
    Given a text that is longer than what a terminal shows of it
    If it is interrupted
    I expect the job to be cancelled, and the part that was shown to be the text's beginning.
    """
    with reltrace.Client(service.address) as client:
        before = client.status().ended.get("CANCELLED", 0)
        whole = client.generate(PROMPT, max_new_tokens=LONG).text
        process, terminal = on_a_terminal(
            "generate", PROMPT, "--max-new-tokens", str(LONG), "--server", service.address
        )
        said = read(terminal)
        process.send_signal(signal.SIGINT)
        said += b"".join(iter(lambda: read(terminal), b""))
        os.close(terminal)
        process.communicate(timeout=60)
        assert process.returncode == 130
        text = said.decode().replace("\r\n", "\n").removesuffix("\n")
        assert text
        assert whole.startswith(text)
        wait_until(
            lambda: client.status().ended.get("CANCELLED", 0) == before + 1, "it is cancelled", 20
        )
        assert service.drafts() == 0


def test_a_short_text_does_not_wait_for_the_end_of_a_long_one(service: Service) -> None:
    """
    Given a text of 300 tokens that is being generated
    If others of one to three tokens are asked for
    I expect them to be there while it is still being generated, as they are alone.
    """
    with reltrace.Client(service.address) as client:
        alone = client.generate("The quick brown fox", max_new_tokens=3)
        ended = sum(client.status().ended.values())
        stream = client.generate_stream(PROMPT, max_new_tokens=300)
        pieces = [next(stream)]
        for count in (1, 2, 3):
            short = client.generate("The quick brown fox", max_new_tokens=count)
            assert short.token_ids == alone.token_ids[:count]
        # Of the four texts three have ended.
        assert sum(client.status().ended.values()) == ended + 3
        pieces += stream
        assert tokens(pieces) == 300
