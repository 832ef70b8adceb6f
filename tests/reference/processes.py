"""The processes of this machine, as Linux lists them."""

from __future__ import annotations

from pathlib import Path


def children(pid: int) -> list[int]:
    """Return the processes that a process has started and that have not ended."""
    folders = Path("/proc").glob("[0-9]*")
    states = {int(folder.name): _state_and_parent(int(folder.name)) for folder in folders}
    return [child for child, (state, parent) in states.items() if parent == pid and state != "Z"]


def is_alive(pid: int) -> bool:
    return _state_and_parent(pid)[0] not in ("Z", "")


def _state_and_parent(pid: int) -> tuple[str, int]:
    try:
        # The name of the program, in brackets before them, may have spaces.
        state, parent, *_ = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", 0
    return state, int(parent)
