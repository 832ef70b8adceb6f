"""The stubs that are checked in are what the .proto files give; the files are clean."""

import shutil
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


@pytest.mark.parametrize("check", [["lint"], ["breaking", "--against", "released.binpb"]])
def test_buf(check: list[str]) -> None:
    done = _buf(PROTO, *check)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_field_that_is_renumbered_breaks_what_was_released(tmp_path: Path) -> None:
    shutil.copytree(PROTO, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "reltrace" / "v1" / "worker.proto"
    file.write_text(file.read_text().replace("bool drafts = 5;", "bool drafts = 99;"))
    done = _buf(tmp_path, "breaking", "--against", "released.binpb")
    assert 'field "5" with name "drafts"' in done.stdout


def _buf(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    buf = Path(sys.executable).parent / "buf"
    return subprocess.run(
        [buf, *arguments], cwd=folder, capture_output=True, text=True, timeout=60, check=False
    )
