"""The journal of a batch: what a commit keeps, whatever ends the process or fills the disk."""

from __future__ import annotations

import random
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
import reltrace
from reltrace.batch.journal import FAILED, REFUSED, TRACED, Failed, Journal

WRITER = """
import sys
from contextlib import closing
from pathlib import Path
from reltrace.batch.journal import Journal
with closing(Journal(Path(sys.argv[1]))) as journal:
    part = 1 + max(journal.parts(), default=-1)
    while True:
        journal.commit(part, [(8 * part + n, 2) for n in range(8)], [], 8 * (part + 1), str(part))
        print(part, flush=True)
        part += 1
"""


def failed(index: int, error: str = "JobFailed") -> Failed:
    return Failed(index, index + 1, f"\ud800 {index}", error, "no")


def test_later_results_replace_earlier_ones(tmp_path: Path) -> None:
    with closing(Journal(tmp_path)) as journal:
        assert (journal.states(), journal.parts(), journal.input()) == (bytearray(), set(), (0, ""))
        journal.commit(0, [(1, 1), (4, 3)], [failed(2), failed(3, "InvalidArgument")], 5, "five")
        journal.commit(1, [(2, 1)], [], 3, "three")
        states = [0, TRACED, TRACED, REFUSED, TRACED]
        assert list(journal.states()) == states
        journal.commit(None, [], [failed(0)], 4, "four")
    with closing(Journal(tmp_path)) as journal:
        assert list(journal.states()) == [FAILED, *states[1:]]
        assert journal.parts() == {0, 1}
        assert journal.input() == (5, "five")
        assert [one.index for one in journal.failures()] == [0, 3]
        assert next(journal.failures()) == failed(0)
        assert journal.traces().tolist() == [(1, 0, 0, 1), (2, 1, 0, 1), (4, 0, 1, 3)]


def test_a_commit_outlives_a_kill(tmp_path: Path) -> None:
    """
    Given a process that commits without a pause, killed at random moments
    I expect every commit that it has reported, and none in part.
    """
    moments = random.Random(0)
    for _ in range(6):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        try:
            reported = [process.stdout.readline() for _ in range(moments.randint(1, 40))]
        finally:
            process.kill()
            reported += process.communicate()[0].splitlines()
        last = int(reported[-1])
        with closing(Journal(tmp_path)) as journal:
            parts = journal.parts()
            count = len(parts)
            assert parts == set(range(count))
            # The last commit may not have been reported.
            assert count in (last + 1, last + 2)
            assert journal.states() == bytearray([TRACED]) * (8 * count)
            assert journal.input() == (8 * count, str(count - 1))


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    with closing(Journal(tmp_path)) as journal:
        journal.commit(0, [(0, 1)], [], 1, "one")
        journal._database.execute("PRAGMA max_page_count = 4")
        with pytest.raises(OSError, match=r"disk is full: '.*journal\.sqlite'"):
            journal.commit(None, [], [failed(index) for index in range(1, 999)], 999, "all")
        assert list(journal.states()) == [TRACED]
        assert journal.input() == (1, "one")


def test_a_damaged_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "journal.sqlite").write_bytes(b"nonsense" * 999)
    with pytest.raises(reltrace.InvalidArgument, match="file is not a database"):
        Journal(tmp_path)
