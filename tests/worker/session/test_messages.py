"""How chunks are put into messages."""

from reltrace_proto.v1 import types_pb2, worker_pb2
from reltrace_worker.session.leases import LeaseKey
from reltrace_worker.session.messages import ended, pack_results


def chunk(job: str, number: int = 1, size: int = 10, last: bool = True) -> worker_pb2.LeasedChunk:
    leased = worker_pb2.LeasedChunk(attempt=1)
    leased.chunk.job_id, leased.chunk.number = job, number
    leased.chunk.tensors.add(data=bytes([number]) * size)
    if last:
        leased.chunk.end.state = types_pb2.JOB_STATE_SUCCEEDED
    return leased


def large(job: str) -> list[worker_pb2.LeasedChunk]:
    return [*(chunk(job, number, 1 << 20, last=False) for number in (1, 2)), chunk(job, 3)]


def test_small_results_share_messages_and_full_chunks_do_not() -> None:
    """
    Given results of one small chunk, one of two full chunks and a small one, and one whose lease
    is lost
    I expect a message for each full chunk, the small ones together in order, and nothing of what
    is lost; and the messages to be what was given.
    """
    sent = [[chunk("a")], [chunk("b")], large("c"), large("lost"), [chunk("d")]]
    held = {LeaseKey(job, 1) for job in "abcd"}

    messages = list(pack_results([iter(chunks) for chunks in sent], held))

    names = [[(c.chunk.job_id, c.chunk.number) for c in m.results.chunks] for m in messages]
    assert names == [[("a", 1), ("b", 1)], [("c", 1)], [("c", 2)], [("c", 3), ("d", 1)]]
    packed = [each for message in messages for each in message.results.chunks]
    assert packed == [each for chunks in (*sent[:3], sent[4]) for each in chunks]
    ends = [{key.job_id for key in ended(message)} for message in messages]
    assert ends == [{"a", "b"}, set(), set(), {"c", "d"}]


def test_a_full_message_is_not_exceeded_by_last_chunks() -> None:
    sent = [iter([chunk(job, size=400_000)]) for job in "abc"]
    held = {LeaseKey(job, 1) for job in "abc"}
    assert [len(m.results.chunks) for m in pack_results(sent, held)] == [2, 1]
