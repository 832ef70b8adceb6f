"""Files of many traces: safetensors or Parquet."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeAlias, get_args

import numpy as np

from reltrace.storage.atomic_files import replace_file
from reltrace.storage.damaged_files import named_if_damaged
from reltrace.storage.tensor_files import write_tensors
from reltrace.storage.trace_files import restore, split
from reltrace.types.arrays import Array
from reltrace.types.errors import MissingDependency, invalid
from reltrace.types.trace import Trace

PartFormat: TypeAlias = Literal["safetensors", "parquet"]
_FORMAT = "reltrace-batch-part-1"
_NO_PART = "no part of a batch"
_NAME = re.compile(rf"part-\d{{6,}}\.(?:{'|'.join(get_args(PartFormat))})")

# Fields of a trace that have a Parquet column, for other readers.
_COLUMNS = ("text", "tokens", "token_ids", "offsets", "layers")

# Of the header of a safetensors file, which has tokens, ids and names of tensors. The format allows
# 100 MB, and there is more in it than the traces.
MAX_HEADER_BYTES = 90_000_000
# Of a tensor in the header, besides its name: type, shape and offsets.
_ENTRY_BYTES = 160


def name_of(number: int, part_format: str) -> str:
    return f"part-{number:06d}.{part_format}"


def is_name(name: str) -> bool:
    return _NAME.fullmatch(name) is not None


def header_bytes(trace: Trace) -> int:
    """Return how many bytes a trace takes in the header of a safetensors file, at most."""
    about, tensors = split(trace, copy_stored=False)
    # Many traces share one.
    del about["provenance"]
    # It is JSON within JSON: quotes and backslashes are escaped once more.
    text = json.dumps(about)
    escaped = len(text) + text.count('"') + text.count("\\") + 2
    return escaped + sum(_ENTRY_BYTES + len(name) for name in ("", *tensors))


def write_part(path: Path, rows: Sequence[tuple[int, Trace]]) -> None:
    """Write traces, each with the number of its prompt, durably and in one step.

    Raises OSError, naming the file, if it can not be written.
    """
    with replace_file(path) as file:
        (_write_parquet if path.suffix == ".parquet" else _write_safetensors)(file, rows)


def open_part(path: Path, stored_in: Sequence[str]) -> Callable[[int], Trace]:
    """Open a file of traces; return what reads the trace in a row of it.

    Both raise InvalidArgument if the file is not such a file.
    """
    with named_if_damaged(path, _NO_PART):
        read = (_open_parquet if path.suffix == ".parquet" else _open_safetensors)(path, stored_in)

    def checked(row: int) -> Trace:
        with named_if_damaged(path, _NO_PART):
            return read(row)

    return checked


def _write_safetensors(file: BinaryIO, rows: Sequence[tuple[int, Trace]]) -> None:
    provenances: dict[str, int] = {}
    about = []
    tensors: dict[str, Array] = {}
    for row, (index, trace) in enumerate(rows):
        described, arrays = split(trace, copy_stored=False)
        # The same for thousands of traces.
        provenance = json.dumps(described.pop("provenance"), sort_keys=True)
        described["provenance"] = provenances.setdefault(provenance, len(provenances))
        about.append({"index": index, **described})
        tensors |= {f"{row}/{name}": array for name, array in arrays.items()}
    metadata = {
        "format": _FORMAT,
        "provenances": json.dumps([json.loads(provenance) for provenance in provenances]),
        "traces": json.dumps(about),
    }
    write_tensors(file, tensors, metadata)


def _open_safetensors(path: Path, stored_in: Sequence[str]) -> Callable[[int], Trace]:
    from safetensors import safe_open

    # Memory-mapped; closed when it is garbage-collected.
    file: Any = safe_open(path, "numpy")
    metadata: dict[str, str] = file.metadata() or {}
    if metadata.get("format") != _FORMAT:
        raise invalid("path", f"{path} is {_NO_PART}")
    abouts = json.loads(metadata["traces"])
    provenances = json.loads(metadata["provenances"])

    def read(row: int) -> Trace:
        about = abouts[row]
        tensors = {name: file.get_tensor(f"{row}/{name}") for name in about["order"]}
        about = about | {"provenance": provenances[about["provenance"]]}
        return restore(about, tensors, stored_in)

    return read


def _write_parquet(file: BinaryIO, rows: Sequence[tuple[int, Trace]]) -> None:
    pyarrow, parquet = pyarrow_modules()
    columns: dict[str, list[Any]] = {}
    for index, trace in rows:
        described, arrays = split(trace, copy_stored=False)
        described["dtypes"] = [array.dtype.str for array in arrays.values()]
        row: dict[str, Any] = {
            "index": index,
            "id": str(trace.id),
            **{name: described.pop(name) for name in _COLUMNS},
            "target": trace.target.token,
            "target_id": trace.target.token_id,
            "logit": trace.target.logit,
            "position": trace.target.position,
            "about": json.dumps(described),
        }
        for name, array in arrays.items():
            row |= {name: array.ravel(), f"{name}.shape": list(array.shape)}
        for name, value in row.items():
            columns.setdefault(name, []).append(value)
    types = {
        "index": pyarrow.int64(),
        "token_ids": pyarrow.list_(pyarrow.int32()),
        "layers": pyarrow.list_(pyarrow.int32()),
        "offsets": pyarrow.list_(pyarrow.list_(pyarrow.int32())),
        "target_id": pyarrow.int32(),
        "logit": pyarrow.float64(),
        "position": pyarrow.int32(),
    }
    arrays_of = {name: pyarrow.array(values, types.get(name)) for name, values in columns.items()}
    table = pyarrow.table(arrays_of, metadata={"format": _FORMAT})
    parquet.write_table(table, file, compression="zstd")


def _open_parquet(path: Path, stored_in: Sequence[str]) -> Callable[[int], Trace]:
    _, parquet = pyarrow_modules()
    table = parquet.read_table(path)
    if (table.schema.metadata or {}).get(b"format") != _FORMAT.encode():
        raise invalid("path", f"{path} is {_NO_PART}")

    def read(row: int) -> Trace:
        about = json.loads(table.column("about")[row].as_py())
        about |= {name: table.column(name)[row].as_py() for name in _COLUMNS}
        tensors = {}
        for name, dtype in zip(about["order"], about["dtypes"], strict=True):
            values = table.column(name)[row].values.to_numpy(zero_copy_only=False)
            shape = table.column(f"{name}.shape")[row].as_py()
            tensors[name] = np.array(values, dtype).reshape(shape)
        return restore(about, tensors, stored_in)

    return read


def pyarrow_modules() -> tuple[Any, Any]:
    """Return pyarrow and pyarrow.parquet; raise MissingDependency if they are not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingDependency(
            "Parquet files need pyarrow: pip install 'reltrace[parquet]'"
        ) from error
    return pyarrow, pyarrow.parquet
