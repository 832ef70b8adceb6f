"""What the checks allow Redis to lose, and what not."""

from pathlib import Path
from typing import Any

import pytest
from chaos import checks, standin
from chaos.journal import Journal
from reltrace_proto.v1 import worker_pb2

WORK = standin.Work(7)


def entry(number: int = 1) -> dict[str, Any]:
    lease = worker_pb2.Lease(job_id="s-0", attempt=1, spec=WORK.spec)
    (chunk,) = standin.chunks(WORK, lease)
    return {
        "entry": number, "job": 0, "number": 1, "state": "JOB_STATE_SUCCEEDED", "attempt": 1,
        "error": "", "digest": standin.digest(chunk.chunk), "bytes": "",
    }  # fmt: skip


STARTED: dict[str, Any] = {"works": [WORK.ids[:3]]}
ACCEPTED: dict[str, Any] = {"submission": "s", "ids": ["s-0"]}
ENDED = [entry(), {"done": True}]


@pytest.fixture
def judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Judge a journal of one submission, whose lines are a second apart, from 0 on."""

    def judged(*lines: dict[str, Any], losses: list[tuple[float, float]]) -> checks.Tally:
        journal, tally = Journal(tmp_path / "journal.jsonl"), checks.Tally(losses)
        for second, line in enumerate(lines):
            monkeypatch.setattr("chaos.journal.time.time", lambda second=second: float(second))
            journal.write(n=0, **line)
        checks.raw(tmp_path / "journal.jsonl", tally)
        return tally

    return judged


@pytest.mark.parametrize(
    ("lines", "known"),
    [
        # Accepted, unknown, and submitted again.
        ([STARTED, ACCEPTED, {"forgotten": True}, ACCEPTED, *ENDED], 1),
        # Read to its end, and less of it is known.
        ([STARTED, ACCEPTED, entry(), {"forgotten": False}, *ENDED], 2),
        # Its first entry was lost, and others were read before that was seen.
        ([STARTED, ACCEPTED, entry(), entry(2), {"forgotten": False}, *ENDED], 2),
        # Read twice, the second time with other bytes.
        ([STARTED, ACCEPTED, entry(), {"again": 1}, {"done": True}], 2),
    ],
)
def test_what_was_known_is_lost_only_when_it_may_be(
    judged: Any, lines: list[dict[str, Any]], known: int
) -> None:
    tally = judged(*lines, losses=[(known - 0.5, known + 0.5)])
    assert (tally.faults, tally.accepted, tally.delivered) == ([], 1, 1)
    assert tally.submitted_again + tally.read_again == 1


@pytest.mark.parametrize("losses", [[], [(2.5, 9.0)]])
def test_what_was_known_before_is_not_lost(judged: Any, losses: list[tuple[float, float]]) -> None:
    tally = judged(STARTED, ACCEPTED, {"forgotten": True}, ACCEPTED, *ENDED, losses=losses)
    assert tally.faults == ["0: was forgotten at 2.0, after it was known at 1.0"]


@pytest.mark.parametrize(
    ("entries", "counted"), [([entry(), entry(2)], (0, 1)), ([], (1, 0))], ids=["twice", "never"]
)
def test_what_comes_twice_or_never_is_a_fault_at_any_time(
    judged: Any, entries: list[dict[str, Any]], counted: tuple[int, int]
) -> None:
    tally = judged(STARTED, ACCEPTED, *entries, {"done": True}, losses=[(0.0, 9.0)])
    assert (tally.lost, tally.duplicates) == counted
    assert tally.faults
