"""Real English: passages of Debian's package `fortunes`, which is read and not shipped.

apt-get install fortunes
"""

from __future__ import annotations

import random
import re
from pathlib import Path

FOLDER = Path("/usr/share/games/fortunes")

_NO_PROSE = {"ascii-art", "goedel", "knghtbrd", "linuxcookie", "translate-me", "tao"}
"""Drawings, puzzles, chats, and what would be there twice."""

_SHORTEST, _LONGEST = 12, 160
"""Words of a passage."""

_ATTRIBUTION = re.compile(r"^\s*--\s*\S")


def passages(seed: int = 0) -> list[str]:
    """Return passages of English prose, each once, in an order drawn by a seed.

    Lines are joined, who said it is left out, and so is what has many characters that are no
    letters: tables, verses of symbols, programs.

    Raises
    ------
    FileNotFoundError
        The package is not installed; says how to do that.
    """
    if not FOLDER.is_dir():
        raise FileNotFoundError(f"{FOLDER} is not there: apt-get install fortunes")
    found: dict[str, None] = {}
    for path in sorted(FOLDER.iterdir()):
        if path.suffix or path.name in _NO_PROSE or not path.is_file():
            continue
        for entry in path.read_text("utf-8", "replace").split("\n%\n"):
            lines = entry.splitlines()
            end = next((i for i, line in enumerate(lines) if _ATTRIBUTION.match(line)), len(lines))
            text = " ".join(" ".join(lines[:end]).split())
            letters = sum(char.isalpha() or char == " " for char in text)
            words = len(text.split())
            if _SHORTEST <= words <= _LONGEST and letters >= 0.93 * len(text):
                found.setdefault(text)
    shuffled = list(found)
    random.Random(seed).shuffle(shuffled)
    return shuffled
