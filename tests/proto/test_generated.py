"""The stubs that are checked in are what the .proto files give; the files are clean."""

import subprocess
import sys
from pathlib import Path

import pytest

PROTO = Path(__file__).parents[2] / "proto"
STUBS = PROTO / "reltrace_proto" / "v1"


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stubs")
    done = subprocess.run(
        [sys.executable, PROTO / "generate.py", out], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return out


def test_there_is_a_stub_for_every_file(generated: Path) -> None:
    names = {path.stem for path in (PROTO / "reltrace" / "v1").glob("*.proto")}
    assert {f"{name}_pb2.py" for name in names} <= {path.name for path in generated.iterdir()}


def test_checked_in_stubs_are_up_to_date(generated: Path) -> None:
    fresh = {path.name: path.read_text() for path in generated.iterdir()}
    checked_in = {path.name: path.read_text() for path in STUBS.glob("*_pb2*")}
    assert checked_in.keys() == fresh.keys(), "run `make proto`"
    stale = [name for name, text in fresh.items() if checked_in[name] != text]
    assert not stale, "run `make proto`"


def test_stubs_do_not_import_the_client(generated: Path) -> None:
    for path in generated.iterdir():
        assert "import reltrace.v1" not in path.read_text()
        assert "from reltrace.v1" not in path.read_text()


def test_buf_lint() -> None:
    buf = Path(sys.executable).parent / "buf"
    done = subprocess.run([buf, "lint"], cwd=PROTO, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
