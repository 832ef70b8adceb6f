"""Files that are damaged: an error of one line that names them, and exit code 1."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cli.conftest import Run

LINES = gzip.compress(
    b"".join(json.dumps({"prompt": f"prompt {n * n}"}).encode() + b"\n" for n in range(2000)),
    mtime=0,
)


def cut(whole: bytes) -> bytes:
    return whole[: len(whole) // 2]


def torn(whole: bytes) -> bytes:
    # The first block after the header is of a kind that there is not.
    return whole[:10] + b"\x07" + whole[11:]


def other(whole: bytes) -> bytes:
    return b"none at all" + whole


@pytest.mark.parametrize("damage", [cut, torn, other])
@pytest.mark.parametrize("called", [("atlas", "build"), ("batch",), ("evaluate",)])
def test_a_damaged_gzip_file(
    command: Run, tmp_path: Path, called: tuple[str, ...], damage: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / "prompts.jsonl.gz"
    path.write_bytes(damage(LINES))
    out = [] if called == ("evaluate",) else [str(tmp_path / "out")]
    code, said, error = command(*called, str(path), *out)
    assert (code, said) == (1, "")
    assert error.startswith("reltrace: input: ")
    assert f"{path} is no complete gzip file: " in error
    assert error.count("\n") == 1


def saved(*shape: int) -> bytes:
    file = io.BytesIO()
    np.save(file, np.zeros(shape, np.float32))
    return file.getvalue()


def announcing(shape: str) -> bytes:
    """Return a file whose header announces more than it has."""
    behind = b" " * (len(shape) - len("(8,)"))
    whole, told = saved(8), b"(8,), }" + behind
    assert told in whole
    return whole.replace(told, f"{shape}, }}".encode())


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"PK\x03\x04 and no more", "was not written by numpy.save: "),
        (b"", "was not written by numpy.save: "),
        (saved(8)[:-3], "was not written by numpy.save: "),
        (announcing("(99999999999999,)"), "was not written by numpy.save: "),
        (announcing("(99999999999999999999999,)"), "was not written by numpy.save: "),
        (saved((1 << 20) + 1), "has 1048577 numbers; allowed: 1048576"),
    ],
)
def test_a_damaged_direction(command: Run, tmp_path: Path, content: bytes, why: str) -> None:
    path = tmp_path / "bad.npy"
    path.write_bytes(content)
    code, said, error = command("generate", "a", "--steer", f"1+{path}")
    assert (code, said) == (1, "")
    assert error.startswith(f"reltrace: steer: {path} {why}")
    assert error.count("\n") == 1


def test_a_file_of_several_arrays_is_refused_as_direction(command: Run, tmp_path: Path) -> None:
    path = tmp_path / "bad.npz"
    np.savez(path, a=np.zeros(8), b=np.zeros(8))
    assert command("generate", "a", "--steer", f"1+{path}") == (
        1,
        "",
        f"reltrace: steer: {path} holds several arrays (.npz); a direction is one\n",
    )
