"""Commands as the pages of this repository print them, to be pasted into a shell."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def commands(page: str) -> list[str]:
    """Return the indented commands of a page, with those of several lines joined."""
    text = (ROOT / page).read_text().replace("\\\n", " ")
    return re.findall(r"^    (reltrace .*)$", text, re.MULTILINE)


def environment() -> dict[str, str]:
    """Return this process's own, without settings of ours, and with our commands in the path."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("RELTRACE_")}
    return own | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{own['PATH']}"}


def shell(command: str, folder: Path, timeout: float = 90) -> str:
    """Run it in a folder; return what it says, once it has ended well."""
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, f"{command}\n{done.stderr}"
    return done.stdout
