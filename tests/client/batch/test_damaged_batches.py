"""Whatever the files of a batch hold, they are read, or an error names them."""

from __future__ import annotations

import gzip
import io
import json
import tracemalloc
from pathlib import Path

import pytest
import reltrace
from batch.written import LINES, Batch
from damage import damaged_bytes, damaged_json, damaged_safetensors, damages, told
from hypothesis import given
from hypothesis import strategies as st
from make_trace import make_trace, with_text
from reltrace.batch import parts
from reltrace.batch.folder import MANIFEST, SUBMISSIONS, BatchFolder
from reltrace.batch.items import InputFormat, InputName, count_items, read_items
from reltrace.types.checks import is_id
from reltrace.types.errors import InvalidArgument

ROWS = [(number, with_text(make_trace(id=number, layers=(0, 1, 2)))) for number in range(3)]
ITEMS = [
    {"id": "a", "prompt": "My cats", "target": {"token": " dogs", "contrast": " cats"}},
    {"custom_id": "b", "method": "POST", "body": {"messages": [{"role": "user", "content": "x"}]}},
    {"prompt": "the", "layers": [0, 1], "top_k": 3, "target": [" a", 5], "timeout": 2.5},
]
CSV = b'id,prompt\n1,"My, ""cats"""\n2,the\n\xc3\xa9,"two\nlines"\n'


def check_items(content: bytes, name: InputName) -> None:
    """Read prompts: each has its id and arguments, or a fault that names a field."""
    input_format = InputFormat(name)
    with told(InvalidArgument, ": "):
        items = list(read_items(io.BytesIO(content), input_format))
        assert [item.index for item in items] == list(range(len(items)))
        count = count_items(io.BytesIO(content), input_format)
        # Parquet says the count in its metadata, which may be what is damaged.
        assert count == len(items) or name == "parquet"
        for item in items:
            assert is_id(item.id)
            assert item.fault is None or item.fault.violations


@damages
@given(data=st.data())
def test_damaged_lines_of_json(data: st.DataObject) -> None:
    lines = [data.draw(damaged_json(item)) for item in ITEMS]
    check_items(b"\n".join(lines), "jsonl")


@damages
@given(damaged_bytes(CSV))
def test_damaged_csv(content: bytes) -> None:
    check_items(content, "csv")


def test_a_line_of_csv_without_an_end_is_not_read_into_memory() -> None:
    """
    Given a small compressed file with a line of 64 MiB
    I expect an error before it is all in memory.
    """
    packed = gzip.compress(b"prompt\n" + bytes(64 << 20), 1)
    tracemalloc.start()
    try:
        with pytest.raises(InvalidArgument, match="line 2 is longer than 16777216 characters"):
            list(read_items(io.BytesIO(packed), InputFormat("csv", compressed=True)))
        assert tracemalloc.get_traced_memory()[1] < 56 << 20
    finally:
        tracemalloc.stop()


@damages
@given(st.binary(max_size=300))
def test_any_text(content: bytes) -> None:
    check_items(content, "text")


@pytest.fixture(scope="module")
def parquet() -> bytes:
    pyarrow, writer = parts.pyarrow_modules()
    file = io.BytesIO()
    writer.write_table(
        pyarrow.table({"id": ["a", "b", None], "prompt": ["My cats", "the", None]}), file
    )
    return file.getvalue()


@damages
@given(data=st.data())
def test_damaged_parquet(parquet: bytes, data: st.DataObject) -> None:
    check_items(data.draw(damaged_bytes(parquet)), "parquet")


@pytest.mark.parametrize("part_format", ["safetensors", "parquet"])
def test_damaged_traces(tmp_path: Path, part_format: str) -> None:
    path = tmp_path / f"part-000000.{part_format}"
    parts.write_part(path, ROWS)
    whole = path.read_bytes()
    damaged = (
        damaged_safetensors(whole, "traces", "provenances")
        if part_format == "safetensors"
        else damaged_bytes(whole)
    )

    @damages
    @given(damaged)
    def check(content: bytes) -> None:
        path.write_bytes(content)
        with told(InvalidArgument, str(path)):
            read = parts.open_part(path, ())
            for row in range(len(ROWS)):
                assert isinstance(read(row), reltrace.Trace)

    check()


def test_damaged_manifests_and_submissions(batch: Batch, tmp_path: Path) -> None:
    batch(LINES)
    folder = tmp_path / "out"
    manifest = json.loads((folder / MANIFEST).read_bytes())

    @damages
    @given(damaged_json(manifest))
    def check(content: bytes) -> None:
        (folder / MANIFEST).write_bytes(content)
        with told(InvalidArgument, str(folder)):
            loaded = reltrace.load_batch(folder)
            assert len(loaded) == len(LINES)
            assert loaded[0].tokens
        with told(InvalidArgument, str(folder)):
            BatchFolder(folder, (1, 1)).route([], None)

    check()

    @damages
    @given(damaged_json({"0123abcd": 20, "4567": 7}))
    def left(content: bytes) -> None:
        (folder / SUBMISSIONS).write_bytes(content)
        found = BatchFolder(folder, (1, 1)).submissions()
        assert all(isinstance(name, str) and isinstance(n, int) for name, n in found.items())

    left()
