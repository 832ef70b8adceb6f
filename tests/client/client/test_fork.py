"""Clients in processes that were forked: they work, or say at once why not."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from fake_server import FakeServer

PROGRAM = Path(__file__).with_name("forking.py")
OPEN = (
    ".*a client was open in its parent, and gRPC can not be used in a process that is forked then: "
    'start it by the method "spawn" or "forkserver".*'
)
MADE_BEFORE = (
    r"TraceError: this client was made before the process was forked; make a new one in each "
    "process|TraceError: the client is closed"
)


@pytest.mark.parametrize(
    ("case", "own", "inherited"),
    [
        ("unused", "<s> child", MADE_BEFORE),
        ("closed", "<s> child", MADE_BEFORE),
        ("open", f"TraceError: this process was forked: {OPEN}", f"TraceError: {OPEN}"),
        ("forgotten", f"TraceError: this process was forked: {OPEN}", f"TraceError: {OPEN}"),
    ],
)
def test_twenty_children(server: FakeServer, case: str, own: str, inherited: str) -> None:
    """
    Given a process with a client that was never used, closed, open, or forgotten without `close`
    I expect its children to work with clients of their own, or to be told at once why they can
    not; none to hang or crash; and the parent to go on.
    """
    done = subprocess.run(
        [sys.executable, str(PROGRAM), server.address, case],
        capture_output=True, text=True, timeout=100, check=True,
    )  # fmt: skip
    *told, exits, parent = done.stdout.splitlines()[:22]
    assert exits == "[]", done.stderr
    kinds = Counter(
        "own" if re.fullmatch(own, line) else "inherited" if re.fullmatch(inherited, line) else line
        for line in told
    )
    assert kinds == {"own": 14, "inherited": 6}
    assert parent == "<s> parent"
    assert done.stdout.splitlines()[22:] == (["<s> parent"] if case == "open" else [])
