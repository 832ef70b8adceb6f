"""The Python of the client's README runs as it is printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from fake_server import FakeServer

README = Path(__file__).parents[2] / "client" / "README.md"
# No text is written here: tests/e2e has those that ask for one.
BLOCKS = [
    block
    for block in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    if "generate" not in block
]


def test_there_are_snippets() -> None:
    assert len(BLOCKS) == 3


@pytest.mark.parametrize("block", BLOCKS)
def test_snippet(
    block: str,
    server: FakeServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert '"127.0.0.1:50051"' in block
    exec(block.replace("127.0.0.1:50051", server.address), {})
    for said in re.findall(r"print\(.*\)  # (.*)", block):
        assert said in capsys.readouterr().out
