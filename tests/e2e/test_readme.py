"""The README's Python runs as printed."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from e2e.conftest import Process, address_in

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", "client/README.md"]


@pytest.fixture
def default_server(start: Callable[..., Process], tmp_path: Path) -> None:
    """`reltrace up` as the README says it: on the default port, with the demo model."""
    service = start("reltrace", "up", "--data", str(tmp_path / "data"))
    assert address_in(service.first_line()) == "127.0.0.1:50051"


@pytest.mark.usefixtures("default_server")
def test_snippets_run_as_printed(tmp_path: Path) -> None:
    for page in PAGES:
        snippets = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
        assert snippets, page
        for number, snippet in enumerate(snippets):
            folder = tmp_path / f"{page.replace('/', '-')}-{number}"
            folder.mkdir()
            done = subprocess.run(
                [sys.executable, "-c", snippet],
                cwd=folder,
                env={k: v for k, v in os.environ.items() if not k.startswith("RELTRACE_")},
                capture_output=True,
                text=True,
                timeout=60,
            )
            assert done.returncode == 0, done.stderr
            if "trace.plot(" in snippet:
                assert (folder / "trace.png").read_bytes().startswith(b"\x89PNG")
                assert (folder / "trace.safetensors").stat().st_size > 0
            if page == "README.md":
                assert "dogs" in done.stdout


def test_commands_named_in_the_readme_exist() -> None:
    text = (ROOT / "README.md").read_text()
    targets = set(re.findall(r"^    make (\w+)", text, re.MULTILINE))
    makefile = (ROOT / "Makefile").read_text()
    assert targets == {"demo", "test"}
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
    help_text = subprocess.run(
        [sys.executable, "-m", "reltrace", "--help"], capture_output=True, text=True, timeout=60
    ).stdout
    for command in set(re.findall(r"^    reltrace (\w+)", text, re.MULTILINE)):
        assert command in help_text
