"""gRPC takes any name for an option, and says nothing of one that it does not know."""

from __future__ import annotations

import re
from pathlib import Path

from grpc._cython import cygrpc

ROOT = Path(__file__).parents[1]
OPTION = re.compile(r'\("(grpc\.[a-z0-9_.]+)",')


def test_grpc_knows_every_option_that_is_set() -> None:
    """
    Given options of servers and channels, such as how often a client may ask whether we live
    I expect each name to be one that gRPC's core reads.
    """
    sources = [p for room in ("client", "scheduler", "worker") for p in (ROOT / room).rglob("*.py")]
    names = {name for source in sources for name in OPTION.findall(source.read_text())}
    assert "grpc.keepalive_time_ms" in names
    core = Path(cygrpc.__file__).read_bytes()
    assert [name for name in sorted(names) if name.encode() not in core] == []
