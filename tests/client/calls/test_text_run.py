"""Reading merger with a text: whatever drafts are lost, repeated or begun again."""

import make_text as words
import numpy as np
import pytest
import reltrace
from fake_server import FakeServer
from hypothesis import given, settings
from hypothesis import strategies as st
from reltrace import TextPiece
from reltrace.calls.text_run import DraftMerger
from reltrace_proto.v1.types_pb2 import Draft

PROVENANCE = reltrace.Provenance("m", "r", "", "", "float32", "", False, "cpu")


def generation(ids: list[int]) -> reltrace.Generation:
    tokens = [word(token) for token in ids]
    return reltrace.Generation(
        text="".join(tokens), tokens=tokens, token_ids=ids, logprobs=np.zeros(len(ids)),
        stopped=False, prompt_tokens=[], prompt_token_ids=[], provenance=PROVENANCE,
    )  # fmt: skip


def word(token: int) -> str:
    return f" {token}"


def draft(attempt: int, first: int, ids: list[int]) -> Draft:
    tokens = tuple(word(token) for token in ids)
    return Draft(attempt=attempt, first=first, token_ids=ids, tokens=tokens, text="".join(tokens))


def drafts(attempt: int, ids: list[int], size: int) -> list[Draft]:
    return [draft(attempt, at, ids[at : at + size]) for at in range(0, len(ids), size)]


def put_together(pieces: list[TextPiece | None]) -> tuple[str, list[int]]:
    """What somebody has who believes the pieces."""
    text, ids = "", []
    for piece in filter(None, pieces):
        if piece.again:
            text, ids = "", []
        text += piece.text
        ids += piece.token_ids
    return text, ids


IDS = st.lists(st.integers(0, 3), min_size=1, max_size=12)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(
    attempts=st.lists(st.tuples(IDS, st.integers(1, 4)), min_size=1, max_size=3),
    lost=st.sets(st.integers(0, 40), max_size=4),
    again=st.integers(0, 20),
    anew=st.none() | st.integers(0, 12),
)
def test_pieces_are_the_text_whatever_happens(
    attempts: list[tuple[list[int], int]], lost: set[int], again: int, anew: int | None
) -> None:
    """
    Given drafts of some attempts, of which the last one's text is the result, some of them lost,
    the last attempt begun again by a worker that lost its connection, and some drafts sent once
    more after the client's was made anew
    I expect the pieces together to be the result.
    """
    sent = [one for number, (ids, size) in enumerate(attempts, 1)
            for one in drafts(number, ids, size)]  # fmt: skip
    if anew is not None:
        ids, size = attempts[-1]
        sent += [draft(len(attempts), 0, ids[: anew + 1]), *drafts(len(attempts), ids, size)]
    merger = DraftMerger(steered=False)
    arrived = [one for number, one in enumerate(sent) if number not in lost]
    arrived = arrived[:again] + arrived
    pieces = [merger.draft(one) for one in arrived]
    whole = generation(attempts[-1][0])
    pieces.append(merger.result(whole))
    assert put_together(pieces) == (whole.text, whole.token_ids)


def test_another_attempt_that_writes_the_same_goes_on_silently() -> None:
    ids = [1, 2, 3, 4, 5]
    merger = DraftMerger(steered=True)
    first = [merger.draft(one) for one in drafts(1, ids[:3], 1)]
    assert [piece and piece.text for piece in first] == [" 1", " 2", " 3"]
    second = [merger.draft(one) for one in drafts(2, ids, 2)]
    assert second[0] is None
    assert (second[1].text, second[1].token_ids, second[1].again) == (" 4", (4,), False)
    assert merger.result(generation(ids)) is None
    assert all(piece.steered for piece in [*first, *second[1:]])


def test_a_draft_that_was_lost_is_made_up_for_when_the_worker_begins_again() -> None:
    """
    Given a reader that missed a draft, and could make nothing of the next
    When the worker connects again and drafts its text from the beginning
    I expect the reader to go on from what it has, and with what follows.
    """
    merger = DraftMerger(steered=False)
    merger.draft(draft(1, 0, [1, 2]))
    assert merger.draft(draft(1, 3, [4])) is None
    piece = merger.draft(draft(1, 0, [1, 2, 3, 4]))
    assert (piece.text, piece.token_ids, piece.again) == (" 3 4", (3, 4), False)
    assert merger.draft(draft(1, 4, [5])).text == " 5"


def test_another_attempt_that_writes_something_else_begins_again() -> None:
    merger = DraftMerger(steered=False)
    merger.draft(draft(1, 0, [1, 2]))
    piece = merger.draft(draft(2, 0, [1, 3]))
    assert (piece.text, piece.token_ids, piece.again) == (" 1 3", (1, 3), True)
    # What the lost worker still sent comes late.
    assert merger.draft(draft(1, 2, [4])) is None
    last = merger.result(generation([1, 3, 5]))
    assert (last.text, last.again) == (" 5", False)


def test_a_shorter_result_begins_again() -> None:
    merger = DraftMerger(steered=False)
    merger.draft(draft(1, 0, [1, 2]))
    piece = merger.result(generation([1]))
    assert (piece.text, piece.token_ids, piece.again) == (" 1", (1,), True)


def test_what_is_asked_for_is_checked_before_anything_is_sent() -> None:
    with reltrace.Client("127.0.0.1:1", retry_timeout=0.1) as client:
        with pytest.raises(
            reltrace.InvalidArgument, match="max_new_tokens: must be a whole number from 1 to 1024"
        ):
            client.generate_stream("a", max_new_tokens=0)
        stream = client.generate_stream("a")
        with pytest.raises(reltrace.Unavailable):
            next(stream)
        assert stream.result is None
        assert stream.job_ids == ()


def test_the_jobs_of_a_text_are_known_while_it_is_written(server: FakeServer) -> None:
    server.drafts = lambda job: [words.draft(job, [1, 2])]
    server.run = lambda spec, job: words.written(job, [1, 2, 3])
    with reltrace.Client(server.address) as client:
        stream = client.generate_stream("a", steer=reltrace.Steer(0, 1, value=4))
        next(stream)
        assert stream.result is None
        jobs = stream.job_ids
        assert len(set(jobs)) == 2
        for _ in stream:
            pass
        assert stream.result is not None
        assert stream.result.unsteered is not None
        assert (stream.result.job_id, stream.result.unsteered.job_id) == jobs
