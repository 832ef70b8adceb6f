"""ARCHITECTURE.md names files that exist."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_file_of_the_map_exists() -> None:
    text = "".join((ROOT / page).read_text() for page in ("ARCHITECTURE.md", "CONTRIBUTING.md"))
    named = set(re.findall(r"`((?:proto|client|scheduler|worker|tests)/[\w./-]+)`", text))
    assert len(named) > 30
    assert not [name for name in sorted(named) if not (ROOT / name).exists()]
