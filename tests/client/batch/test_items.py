"""Files of prompts, of every kind and fault."""

from __future__ import annotations

import gzip
import io
import json
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import reltrace
from hypothesis import given
from hypothesis import strategies as st
from reltrace.batch.items import Fingerprint, InputFormat, Item, count_items, read_items


def read(content: str | bytes, name: str, **options: str) -> list[Item]:
    data = content if isinstance(content, bytes) else content.encode()
    return list(read_items(io.BytesIO(data), InputFormat(name, **options)))


def prompts(items: list[Item]) -> list[object]:
    return [item.arguments.get("prompt", item.fault and str(item.fault)) for item in items]


def test_json_lines() -> None:
    first, second, third = read(
        '{"id": "a", "prompt": "x"}\n\n"just text"\n'
        '{"input_ids": [1, 2], "target": {"token": 5, "position": 1}, "rule": "cp_lrp"}\n',
        "jsonl",
    )
    assert (first.index, first.line, first.id, first.arguments) == (0, 1, "a", {"prompt": "x"})
    assert (second.index, second.line, second.id) == (1, 3, 1)
    assert second.arguments == {"prompt": "just text"}
    assert third.arguments == {
        "input_ids": [1, 2],
        "target": reltrace.Target(token=5, position=1),
        "rule": "cp_lrp",
    }


def test_lines_of_openai_batches() -> None:
    messages = [{"role": "user", "content": "hello"}]
    body = {"model": "other", "messages": messages, "max_tokens": 9}
    line = {"custom_id": "r-1", "method": "POST", "url": "/v1/chat/completions", "body": body}
    found, own = read(
        json.dumps(line) + "\n" + json.dumps({"id": "a", "messages": messages}), "jsonl"
    )
    assert (found.id, found.arguments, found.fault) == ("r-1", {"messages": messages}, None)
    assert (own.id, own.arguments, own.fault) == ("a", {"messages": messages}, None)
    line |= {"url": "/v1/completions", "body": {"model": "other", "prompt": "x"}, "method": None}
    (found,) = read(json.dumps(line), "jsonl")
    assert (found.id, found.arguments, found.fault) == ("r-1", {"prompt": "x"}, None)


FAULTS = {
    '{"custom_id": "r", "body": {"input": "x"}}': "body: must have one of",
    '{"custom_id": "r", "body": {"prompt": "x", "messages": []}}': "body: must have one of",
    '{"custom_id": "r", "body": {"prompt": ["x"]}}': "body.prompt: must be one text, not list",
    '{"custom_id": "r", "url": "/v1"}': "body: must have one of",
    '{"custom_id": "r", "body": {"prompt": "x"}, "target": "y"}': "target: is no field of OpenAI's"
    " batch format; allowed: custom_id, method, url, body",
    '{"id": "r", "body": {"prompt": "x"}}': "id: is no field of OpenAI's batch format",
    '{"custom_id": 1.5, "body": {"messages": []}}': "custom_id: must be text or a whole number",
    "{nope": "line: is not JSON",
    "[1]": "line: must be a JSON object, not list",
    '{"prompt": "x", "colour": 1}': "colour: is not an argument",
    '{"prompt": "x", "id": 1.5}': "id: must be text or a whole number",
    '{"prompt": "x", "id": true}': "id: must be text or a whole number",
    '{"prompt": "x", "target": {"tokn": 1}}': "target.tokn: is no field of a target",
    '{"prompt": "x", "target": [{"position": "y"}]}': "position: must be a whole number",
    "[" * 100_000: "line: is not JSON",
}


@pytest.mark.parametrize("line", FAULTS, ids=lambda line: line[:30])
def test_a_line_that_is_wrong_is_a_fault_of_its_own(line: str) -> None:
    before, wrong, after = read(f'{{"prompt": "a"}}\n{line}\n{{"prompt": "b"}}\n', "jsonl")
    assert before.fault is after.fault is None
    assert FAULTS[line] in str(wrong.fault)
    assert wrong.index == 1


@pytest.mark.parametrize(
    "line",
    [
        '{"id": "q7", "prompt": "x", "target": {"tokn": 1}}',
        '{"custom_id": "q7", "prompt": "x"}',
        '{"custom_id": "q7", "body": {"input": "x"}}',
    ],
)
def test_a_fault_keeps_the_id(line: str) -> None:
    (item,) = read(line, "jsonl")
    assert item.id == "q7"
    assert item.fault is not None


def test_a_line_that_is_too_long_is_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reltrace.batch.items._MAX_LINE_BYTES", 100)
    for name in ("jsonl", "text"):
        items = read(b'"ok"\n"' + b"x" * 1000 + b'"\n"ok"', name)
        assert [item.fault is None for item in items] == [True, False, True]
        assert "longer than 100 bytes" in str(items[1].fault)
        assert len(items[1].content) <= 101


def test_plain_text() -> None:
    items = read(b"\xef\xbb\xbfone \r\n\n   \n two\nb\xffd\nlast", "text")
    assert prompts(items) == ["one ", " two", "line: is not UTF-8 at byte 1", "last"]
    assert [item.line for item in items] == [1, 4, 5, 6]


def test_csv() -> None:
    items = read('id,prompt,note\na,"two\nlines, and ""quotes""",n\n7,x,\n', "csv")
    assert prompts(items) == ['two\nlines, and "quotes"', "x"]
    assert [(item.id, item.line) for item in items] == [("a", 2), ("7", 4)]
    items = read("text;x\n", "csv", column="text;x")
    assert items == []


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("a,b\n1,2\n", {}, "column: 'prompt' is not in the file; it has a, b"),
        ("prompt\nx\n", {"id_column": "k"}, "id-column: 'k' is not in the file; it has prompt"),
        ('prompt\n"x\n', {}, "input: the row at line 2 is not CSV"),
        (b"prompt\n\xff\n", {}, "input: is not UTF-8"),
        ("", {}, "column: 'prompt' is not in the file"),
    ],
)
def test_a_csv_file_that_is_wrong(
    content: str | bytes, options: dict[str, str], message: str
) -> None:
    with pytest.raises(reltrace.InvalidArgument, match=message):
        read(content, "csv", **options)


EMPTY = "id: is empty; give each row an id, or name another column of ids"
IDS = {
    # As pandas stores whole numbers with a gap.
    "floats": ([101.0, None, float("nan"), 103.0], [101, EMPTY, EMPTY, 103]),
    "gaps": ([1, None, 2], [1, EMPTY, 2]),
    "parts": (
        [1.5, 2.0**53],
        [f"id: must be text or a whole number, not {n}" for n in (1.5, 2.0**53)],
    ),
    "decimals": (
        [Decimal("7.00"), Decimal("7.50")],
        [7, "id: must be text or a whole number, not Decimal('7.50')"],
    ),
    "bytes": ([b"caf\xc3\xa9", b"\xff"], ["café", r"id: must be UTF-8, not b'\xff'"]),
    "dates": ([date(2024, 2, 29)], ["2024-02-29"]),
    "times": ([datetime(2024, 2, 29, 12, 30, tzinfo=UTC)], ["2024-02-29T12:30:00+00:00"]),
    "booleans": ([True], ["id: must be text or a whole number, not True"]),
    "lists": ([[1]], ["id: must be text or a whole number, not [1]"]),
    "small": (pyarrow.array([3], pyarrow.uint8()), [3]),
    "categories": (pyarrow.array(["a", "b", "a"]).dictionary_encode(), ["a", "b", "a"]),
}


@pytest.mark.parametrize("kind", IDS)
def test_ids_of_parquet_are_right_or_an_error(tmp_path: Path, kind: str) -> None:
    """
    Given a column of ids that are not plain text or integers
    I expect the id that is meant, or a fault of the row: never its number without a word.
    """
    column, expected = IDS[kind]
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"prompt": ["x"] * len(expected), "id": column})
    pyarrow.parquet.write_table(table, path)
    with path.open("rb") as file:
        items = list(read_items(file, InputFormat("parquet")))
    assert [str(item.fault) if item.fault else item.id for item in items] == expected
    assert all(type(item.id) in (int, str) for item in items)


@pytest.mark.parametrize("name", ["text", "jsonl"])
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_a_file_in_utf_16_is_refused(name: str, encoding: str) -> None:
    """Its lines would be taken for texts with zeros in them."""
    with pytest.raises(reltrace.InvalidArgument, match="input: is UTF-16; convert it to UTF-8"):
        read("\ufeffone\ntwo\n".encode(encoding), name)


def test_an_empty_id_of_csv_is_a_fault() -> None:
    items = read("id,prompt\na,x\n,y\n", "csv")
    assert [item.id for item in items] == ["a", 1]
    assert str(items[1].fault) == EMPTY


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": ["x", None, "z"], "key": [5, 6, 7]})
    pyarrow.parquet.write_table(table, path)
    reading = InputFormat("parquet", "text", "key")
    with path.open("rb") as file:
        items = list(read_items(file, reading))
    with path.open("rb") as file:
        assert count_items(file, reading) == 3
    assert prompts(items) == ["x", "text: must be text, not NoneType", "z"]
    assert [item.id for item in items] == [5, 6, 7]
    with pytest.raises(reltrace.InvalidArgument, match="input: is no Parquet file"):
        read("hello", "parquet")


MESSAGES = [{"role": "user", "content": "hello"}]


def test_conversations_in_columns(tmp_path: Path) -> None:
    """
    Given CSV and Parquet with a column of conversations
    I expect them to be read where there are no prompts, or where they are asked for.
    """
    row = json.dumps(MESSAGES).replace('"', '""')
    expected = [{"messages": MESSAGES}]
    items = read(f'id,messages\n7,"{row}"\n8,[\n9,{{}}\n', "csv")
    assert [item.arguments for item in items] == [*expected, {}, {}]
    assert [item.id for item in items] == ["7", "8", "9"]
    assert "messages: is not JSON" in str(items[1].fault)
    assert "messages: must be a list of messages, not dict" in str(items[2].fault)
    both = f'prompt,messages\nx,"{row}"\n'
    assert [item.arguments for item in read(both, "csv")] == [{"prompt": "x"}]
    assert [item.arguments for item in read(both, "csv", column="messages")] == expected

    path = tmp_path / "a.parquet"
    table = pyarrow.table({"messages": [MESSAGES, None], "prompt_id": ["a", "b"]})
    pyarrow.parquet.write_table(table, path)
    with path.open("rb") as file:
        items = list(read_items(file, InputFormat("parquet", None, "prompt_id")))
    assert [item.arguments for item in items] == [*expected, {}]
    assert "messages: must be a list of messages, not NoneType" in str(items[1].fault)


def test_compressed() -> None:
    data = gzip.compress(b'"a"\n\n"b"\n')
    reading = InputFormat("jsonl", compressed=True)
    assert prompts(list(read_items(io.BytesIO(data), reading))) == ["a", "b"]
    assert count_items(io.BytesIO(data), reading) == 2
    for broken in (data[:-4], b"plain"):
        with pytest.raises(reltrace.InvalidArgument, match="input: is no complete gzip file"):
            list(read_items(io.BytesIO(broken), reading))


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("a.jsonl", InputFormat("jsonl")),
        ("a.b.TXT", InputFormat("text")),
        ("a.csv.gz", InputFormat("csv", compressed=True)),
        ("a.parquet", InputFormat("parquet")),
    ],
)
def test_the_ending_tells_the_format(path: str, expected: InputFormat) -> None:
    assert InputFormat.of(Path(path), None, None, None) == expected


def test_standard_input_is_json_lines_by_default() -> None:
    assert InputFormat.of(None, None, None, None) == InputFormat("jsonl")


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("a", {}, "input-format: of 'a' is not known"),
        ("a.gz", {}, "input-format: of 'a.gz' is not known"),
        ("a.txt", {"column": "x"}, "column: is for csv and parquet; text has no columns"),
        ("a.jsonl", {"id_column": "x"}, "id-column: is for csv and parquet"),
        ("a.parquet.gz", {}, "parquet is read from a file that is not compressed"),
        (None, {"name": "parquet"}, "parquet is read from a file"),
    ],
)
def test_a_format_that_does_not_fit(
    path: str | None, options: dict[str, str], message: str
) -> None:
    values = {"name": None, "column": None, "id_column": None} | options
    with pytest.raises(reltrace.InvalidArgument, match=message):
        InputFormat.of(None if path is None else Path(path), **values)


texts = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), max_size=20)


@given(texts)
def test_what_is_written_as_json_lines_is_read(values: list[str]) -> None:
    content = "".join(json.dumps({"prompt": value, "id": value}) + "\n" for value in values)
    items = read(content, "jsonl")
    assert prompts(items) == values
    assert [item.id for item in items] == values
    assert count_items(io.BytesIO(content.encode()), InputFormat("jsonl")) == len(values)


@given(texts, texts)
def test_a_fingerprint_tells_prompts_apart(first: list[str], second: list[str]) -> None:
    def digest(values: list[str]) -> str:
        fingerprint = Fingerprint()
        for item in read("".join(json.dumps(value) + "\n" for value in values), "jsonl"):
            fingerprint.add(item)
        return fingerprint.digest()

    assert (digest(first) == digest(second)) == (first == second)


@pytest.mark.parametrize("name", ["csv", "jsonl"])
def test_more_than_what_a_trace_takes_is_read_where_it_is_asked_for(name: str) -> None:
    content = {
        "csv": "prompt,answer\nx,y\nz,\n",
        "jsonl": '{"prompt": "x", "answer": "y"}\n{"prompt": "z", "answer": null}\n',
    }[name]
    items = list(read_items(io.BytesIO(content.encode()), InputFormat(name, also=("answer",))))
    assert [item.arguments for item in items] == [{"prompt": "x", "answer": "y"}, {"prompt": "z"}]
    first = read(content, name)[0]
    # A batch reads of CSV what it always did; of JSON it takes nothing that it does not know.
    assert first.arguments == ({"prompt": "x"} if name == "csv" else {})
    assert (first.fault is None) == (name == "csv")
