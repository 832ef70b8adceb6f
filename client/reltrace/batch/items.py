"""The prompts of a file, one by one: JSON lines, plain text, CSV, Parquet."""

from __future__ import annotations

import codecs
import csv
import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeAlias, get_args

from reltrace.batch.parts import pyarrow_modules
from reltrace.storage.damaged_files import invalid_if_damaged
from reltrace.types.checks import check_id, is_id
from reltrace.types.errors import InvalidArgument, invalid
from reltrace.types.request import Arguments
from reltrace.types.target import Target

InputName: TypeAlias = Literal["jsonl", "text", "csv", "parquet"]
_SUFFIXES: dict[str, InputName] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".txt": "text",
    ".csv": "csv",
    ".parquet": "parquet",
}
# A job is no larger either.
_MAX_LINE_BYTES = 16 * 1024 * 1024
_PARQUET_ROWS = 4096
# Below it a float is one whole number, and not the nearest one to several.
_EXACT_FLOATS = 2**53


@dataclass(frozen=True, slots=True)
class Item:
    index: int  # among the prompts, from 0
    line: int  # of the file, or row of a Parquet file, from 1
    id: str | int  # as the file names it, else `index`
    arguments: dict[str, Any] = field(default_factory=dict)  # of `trace`
    fault: InvalidArgument | None = None  # why it is not a prompt
    content: bytes = b""  # of the file, to tell whether it has changed


@dataclass(frozen=True, slots=True)
class InputFormat:
    name: InputName
    # Of CSV and Parquet; default: "prompt", else "messages", whose cells are conversations (in CSV
    # as JSON), and "id" if there is such a column.
    column: str | None = None
    id_column: str | None = None
    compressed: bool = False  # by gzip
    # Fields that a prompt may have beside the arguments of `trace`; further columns.
    also: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        path: Path | None,
        name: InputName | None,
        column: str | None,
        id_column: str | None,
        also: tuple[str, ...] = (),
    ) -> InputFormat:
        """Return the format of a file, by `name` or else by its suffix; None: standard input.

        The default of standard input is JSON lines. Raises InvalidArgument if the suffix names no
        format, or the options do not fit the format.
        """
        compressed = path is not None and path.suffix.lower() == ".gz"
        name = name or ("jsonl" if path is None else format_of(path))
        if name is None:
            assert path is not None
            raise invalid(
                "input-format",
                f"of {path.name!r} is not known; give one of {', '.join(get_args(InputName))}, or "
                f"a file name that ends in {', '.join(_SUFFIXES)} (and .gz)",
            )
        for field_name, value in (("column", column), ("id-column", id_column)):
            if value is not None and name not in ("csv", "parquet"):
                raise invalid(field_name, f"is for csv and parquet; {name} has no columns")
        if name == "parquet" and (path is None or compressed):
            raise invalid("input-format", "parquet is read from a file that is not compressed")
        return cls(name, column, id_column, compressed, also)


def format_of(path: Path) -> InputName | None:
    """Return the format that the suffix of a file names, before a .gz; None: it names none."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"]:
        suffixes.pop()
    return _SUFFIXES.get(suffixes[-1]) if suffixes else None


def read_items(file: BinaryIO, input_format: InputFormat) -> Iterator[Item]:
    """Read the prompts of a file in order; a line, or some rows, are in memory at a time.

    Raises InvalidArgument if the file as a whole can not be read. A single prompt that is wrong is
    an item with a fault.
    """
    with _opened(file, input_format) as opened:
        yield from _READERS[input_format.name](opened, input_format)


def count_items(file: BinaryIO, input_format: InputFormat) -> int:
    """Return how many prompts a file has, which takes a pass over it; errors as `read_items`."""
    with _opened(file, input_format) as opened:
        if input_format.name == "parquet":
            return int(_parquet_file(opened).metadata.num_rows)
        if input_format.name == "csv":
            return sum(1 for _ in _csv(opened, input_format))
        return sum(1 for _ in _lines(opened))


@contextmanager
def _opened(file: BinaryIO, input_format: InputFormat) -> Iterator[BinaryIO]:
    """Decompress a file if need be; raise InvalidArgument where it turns out to be damaged."""
    if not input_format.compressed:
        yield file
        return
    try:
        yield io.BufferedReader(gzip.GzipFile(fileobj=file))
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        name = getattr(file, "name", None)
        named = f"{name} " if isinstance(name, str) else ""
        raise invalid("input", f"{named}is no complete gzip file: {error}") from error


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Yield lines that are not blank, with their numbers; one that is too long is cut off."""
    number = 0
    while line := file.readline(_MAX_LINE_BYTES + 1):
        number += 1
        if number == 1 and line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            # Most of its lines would be texts of UTF-8 too, with zeros between the letters.
            raise invalid("input", "is UTF-16; convert it to UTF-8")
        rest = line
        while len(rest) > _MAX_LINE_BYTES and not rest.endswith(b"\n"):
            rest = file.readline(_MAX_LINE_BYTES + 1)
        if content := line.rstrip(b"\r\n"):
            if number == 1:
                content = content.removeprefix(codecs.BOM_UTF8)
            if content.strip():
                yield number, content


def _jsonl(file: BinaryIO, input_format: InputFormat) -> Iterator[Item]:
    for index, (line, content) in enumerate(_lines(file)):
        yield _from_json(index, line, content, input_format.also)


def _from_json(index: int, line: int, content: bytes, also: tuple[str, ...]) -> Item:
    name: Any = None
    try:
        value = _json_object(content)
        openai = "custom_id" in value or "body" in value
        id_field = "custom_id" if openai else "id"
        # First, so that an item with a fault keeps its id.
        name = value.pop(id_field, None)
        check_id(index if name is None else name, id_field)
        arguments = {key: part for key, part in value.items() if part is not None}
        if openai:
            arguments = _from_openai(arguments)
        if "target" in arguments:
            arguments["target"] = _target(arguments["target"])
        # Checks the names of arguments; their values are checked when the job is made.
        Arguments().with_item({key: arguments[key] for key in arguments if key not in also})
    except InvalidArgument as error:
        return Item(index, line, name if is_id(name) else index, fault=error, content=content)
    return Item(index, line, index if name is None else name, arguments, content=content)


def _check_length(line: bytes) -> None:
    if len(line) > _MAX_LINE_BYTES:
        raise invalid("line", f"is longer than {_MAX_LINE_BYTES} bytes")


def _json_object(content: bytes) -> dict[str, Any]:
    """Return the object of a line of JSON; a text stands for a prompt."""
    _check_length(content)
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise invalid("line", f"is not JSON: {error}") from None
    if isinstance(value, str):
        value = {"prompt": value}
    if not isinstance(value, dict):
        raise invalid("line", f"must be a JSON object, not {type(value).__name__}")
    return value


def _from_openai(line: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments for a line of OpenAI's batch format, without its id.

    Other fields of the body (model, sampling) are about generating with another server: ignored.
    """
    for key in line:
        if key not in ("method", "url", "body"):
            raise invalid(
                key, "is no field of OpenAI's batch format; allowed: custom_id, method, url, body"
            )
    body = line["body"] if isinstance(line.get("body"), dict) else {}
    given = [key for key in ("messages", "prompt") if body.get(key) is not None]
    if len(given) != 1:
        raise invalid("body", "must have one of messages (of a chat) and prompt (of a completion)")
    if given == ["prompt"] and not isinstance(body["prompt"], str):
        raise invalid("body.prompt", f"must be one text, not {type(body['prompt']).__name__}")
    return {given[0]: body[given[0]]}


def _target(value: Any) -> Any:
    if isinstance(value, list):
        return [_target(part) for part in value]
    if not isinstance(value, dict):
        return value
    known = Target.__dataclass_fields__
    for key in value:
        if key not in known:
            raise invalid(f"target.{key}", f"is no field of a target; allowed: {', '.join(known)}")
    return Target(**value)


def _text(file: BinaryIO, input_format: InputFormat) -> Iterator[Item]:
    for index, (line, content) in enumerate(_lines(file)):
        arguments, fault = {}, None
        try:
            _check_length(content)
            arguments = {"prompt": content.decode()}
        except UnicodeDecodeError as error:
            fault = invalid("line", f"is not UTF-8 at byte {error.start}")
        except InvalidArgument as error:
            fault = error
        yield Item(index, line, index, arguments, fault, content)


def _text_lines(text: io.TextIOWrapper) -> Iterator[str]:
    """Yield lines; raise InvalidArgument at one that is too long, before it is read to its end."""
    number = 0
    while line := text.readline(_MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > _MAX_LINE_BYTES:
            raise invalid("input", f"line {number} is longer than {_MAX_LINE_BYTES} characters")
        yield line


def _csv(file: BinaryIO, input_format: InputFormat) -> Iterator[Item]:
    text = io.TextIOWrapper(file, "utf-8-sig", newline="")
    line = 1
    csv.field_size_limit(_MAX_LINE_BYTES)
    try:
        reader = csv.DictReader(_text_lines(text), strict=True)
        found = _with_columns(input_format, reader.fieldnames or [])
        line = reader.line_num + 1
        for index, row in enumerate(reader):
            yield _from_row(index, line, row, found)
            line = reader.line_num + 1
    except csv.Error as error:
        raise invalid("input", f"the row at line {line} is not CSV: {error}") from error
    except UnicodeDecodeError as error:
        raise invalid("input", f"is not UTF-8 at byte {error.start} or near it") from error
    finally:
        text.detach()


def _parquet(file: BinaryIO, input_format: InputFormat) -> Iterator[Item]:
    parquet = _parquet_file(file)
    found = _with_columns(input_format, parquet.schema_arrow.names)
    columns = [name for name in (found.column, found.id_column, *found.also) if name is not None]
    index = 0
    batches = parquet.iter_batches(_PARQUET_ROWS, columns=columns)
    while True:
        with _parquet_errors():
            batch = next(batches, None)
            rows = [] if batch is None else batch.to_pylist()
        if batch is None:
            return
        for row in rows:
            yield _from_row(index, index + 1, row, found)
            index += 1


def _parquet_file(file: BinaryIO) -> Any:
    _, parquet = pyarrow_modules()
    with _parquet_errors():
        return parquet.ParquetFile(file)


def _parquet_errors() -> AbstractContextManager[None]:
    return invalid_if_damaged("input", "is no Parquet file")


_READERS: dict[str, Callable[[BinaryIO, InputFormat], Iterator[Item]]] = {
    "jsonl": _jsonl,
    "text": _text,
    "csv": _csv,
    "parquet": _parquet,
}


def _with_columns(input_format: InputFormat, columns: Sequence[str]) -> InputFormat:
    """Return the format with the columns of a file that are read.

    Raises InvalidArgument if the file lacks the column of the prompts, or the one given for ids.
    """
    column, id_column = input_format.column, input_format.id_column
    if column is None:
        column = "messages" if "messages" in columns and "prompt" not in columns else "prompt"
    for field_name, name in (("column", column), ("id-column", id_column)):
        if name is not None and name not in columns:
            raise invalid(field_name, f"{name!r} is not in the file; it has {', '.join(columns)}")
    if id_column is None and "id" in columns:
        id_column = "id"
    also = tuple(name for name in input_format.also if name in columns)
    return replace(input_format, column=column, id_column=id_column, also=also)


def _from_row(index: int, line: int, row: Mapping[str, Any], found: InputFormat) -> Item:
    assert found.column is not None
    prompt = row.get(found.column)
    name = index if found.id_column is None else row.get(found.id_column)
    # An empty cell of CSV is what null is in JSON.
    also = {key: row[key] for key in found.also if row.get(key) not in (None, "")}
    content = repr((prompt, name, *also.items())).encode(errors="surrogatepass")
    item_id: str | int = index
    try:
        item_id = index if found.id_column is None else _cell_id(name, found.id_column)
        arguments = {**_input(prompt, found.column), **also}
    except InvalidArgument as error:
        return Item(index, line, item_id, fault=error, content=content)
    return Item(index, line, item_id, arguments, content=content)


def _cell_id(cell: object, column: str) -> str | int:
    """Return the id in a cell; pandas stores whole numbers with gaps between them as floats."""
    if cell is None or cell == "" or cell != cell:
        raise invalid(column, "is empty; give each row an id, or name another column of ids")
    if isinstance(cell, float) and cell.is_integer() and abs(cell) < _EXACT_FLOATS:
        return int(cell)
    if isinstance(cell, Decimal) and cell == cell.to_integral_value():
        return int(cell)
    if isinstance(cell, date):
        return cell.isoformat()
    if isinstance(cell, bytes):
        try:
            return cell.decode()
        except UnicodeDecodeError:
            raise invalid(column, f"must be UTF-8, not {cell!r}") from None
    return check_id(cell, column)


def _input(cell: object, column: str) -> dict[str, Any]:
    if column != "messages":
        if isinstance(cell, str):
            return {"prompt": cell}
        raise invalid(column, f"must be text, not {type(cell).__name__}")
    if isinstance(cell, str):
        try:
            cell = json.loads(cell)
        except (ValueError, RecursionError) as error:
            raise invalid(column, f"is not JSON: {error}") from None
    if isinstance(cell, list):
        return {"messages": cell}
    raise invalid(column, f"must be a list of messages, not {type(cell).__name__}")


class Fingerprint:
    """Digest of the first prompts of a file, to tell whether they have changed."""

    def __init__(self) -> None:
        self.count = 0
        self._hash = hashlib.blake2b(digest_size=16)

    def add(self, item: Item) -> None:
        self._hash.update(len(item.content).to_bytes(8, "little"))
        self._hash.update(item.content)
        self.count += 1

    def digest(self) -> str:
        return self._hash.copy().hexdigest()
