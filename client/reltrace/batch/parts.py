"""Files of many traces: safetensors or Parquet."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias, get_args

import numpy as np

from reltrace.storage.atomic_files import UNFINISHED
from reltrace.storage.tensor_file import write_tensors
from reltrace.storage.trace_files import describe, place_of, restore, tensors_of
from reltrace.types.errors import MissingDependency, invalid
from reltrace.types.trace import Array, Trace

PartFormat: TypeAlias = Literal["safetensors", "parquet"]
_FORMAT = "reltrace-batch-part-1"
_NAME = re.compile(rf"part-\d{{6,}}\.(?:{'|'.join(get_args(PartFormat))})")

# What a trace has in columns of its own in Parquet, to be read by others too.
_OWN_COLUMNS = ("text", "tokens", "token_ids", "offsets", "layers")

# Of the head of a safetensors file, which holds tokens, ids and names of tensors. The format allows
# 100 MB; there is more in it than the traces.
MOST_HEAD_BYTES = 90_000_000
# Of a tensor in the head, besides its name: type, shape and place.
_ENTRY_BYTES = 160


class Part(Protocol):
    """An open file of traces."""

    def trace(self, row: int) -> Trace:
        """Return the trace in a row."""
        ...


def name_of(number: int, part_format: PartFormat) -> str:
    """Return the name of the file with a number."""
    return f"part-{number:06d}.{part_format}"


def number_of(name: str) -> int:
    """Return the number of the file with a name."""
    return int(name.removeprefix("part-").partition(".")[0])


def is_name(name: str) -> bool:
    """Tell whether `name_of` gives such a name."""
    return _NAME.fullmatch(name) is not None


def head_bytes(trace: Trace) -> int:
    """Return how many bytes a trace takes in the head of a safetensors file, at most."""
    place = place_of(trace)
    described = {**describe(trace), **place}
    # Many traces share one.
    del described["provenance"]
    # JSON within JSON.
    about = json.dumps(json.dumps(described))
    names = [] if place else [
        f"{site}/{part}" for site, parts in trace.arrays.items() for part in parts
    ]  # fmt: skip
    # Each name is there twice: of the tensor, and in the order of the sites.
    return len(about) + _ENTRY_BYTES * (1 + len(names)) + 2 * sum(map(len, names))


def write(path: Path, rows: Sequence[tuple[int, Trace]]) -> None:
    """Write traces, each with the index of its prompt, to an unfinished file; nothing is synced.

    Raises
    ------
    OSError
        If it can not be written.
    """
    target = path.name.removesuffix(UNFINISHED)
    (_write_parquet if target.endswith(".parquet") else _write_safetensors)(path, rows)


def open_part(path: Path) -> Part:
    """Open a file of traces.

    Raises
    ------
    InvalidArgument
        If it is none.
    """
    return _ParquetPart(path) if path.suffix == ".parquet" else _SafetensorsPart(path)


def _write_safetensors(path: Path, rows: Sequence[tuple[int, Trace]]) -> None:
    origins: dict[str, int] = {}
    about = []
    tensors: dict[str, Array] = {}
    for row, (index, trace) in enumerate(rows):
        place = place_of(trace)
        described = {"index": index, **describe(trace), **place}
        # The same for thousands of traces.
        origin = json.dumps(described.pop("provenance"), sort_keys=True)
        described["provenance"] = origins.setdefault(origin, len(origins))
        arrays = {} if place else tensors_of(trace)
        described["order"] = list(arrays)
        about.append(described)
        tensors |= {f"{row}/{name}": array for name, array in arrays.items()}
    metadata = {
        "format": _FORMAT,
        "provenances": json.dumps([json.loads(origin) for origin in origins]),
        "traces": json.dumps(about),
    }
    write_tensors(path, tensors, metadata)


class _SafetensorsPart:
    """See `Part`."""

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            opened: Any = safe_open(path, "numpy")
            self._file = opened
            metadata: dict[str, str] = self._file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise invalid("path", f"{path} is no part of a batch")
            self._about = json.loads(metadata["traces"])
            self._provenances = json.loads(metadata["provenances"])
        except (SafetensorError, KeyError, json.JSONDecodeError) as error:
            raise invalid("path", f"{path} is no part of a batch: {error}") from error

    def trace(self, row: int) -> Trace:
        about = self._about[row]
        tensors = {name: self._file.get_tensor(f"{row}/{name}") for name in about["order"]}
        return restore(about | {"provenance": self._provenances[about["provenance"]]}, tensors)


def _write_parquet(path: Path, rows: Sequence[tuple[int, Trace]]) -> None:
    pyarrow, parquet = pyarrow_modules()
    columns: dict[str, list[Any]] = {
        name: []
        for name in (
            "index", "id", *_OWN_COLUMNS, "target", "target_id", "logit", "position", "about",
        )
    }  # fmt: skip
    for index, trace in rows:
        place = place_of(trace)
        described = describe(trace) | place
        arrays = {} if place else tensors_of(trace)
        described["order"] = list(arrays)
        described["dtypes"] = [array.dtype.str for array in arrays.values()]
        columns["index"].append(index)
        columns["id"].append(str(trace.id))
        for name in _OWN_COLUMNS:
            columns[name].append(described.pop(name))
        columns["target"].append(trace.target.token)
        columns["target_id"].append(trace.target.token_id)
        columns["logit"].append(trace.target.logit)
        columns["position"].append(trace.target.position)
        columns["about"].append(json.dumps(described))
        for name, array in arrays.items():
            columns.setdefault(name, []).append(array.ravel())
            columns.setdefault(f"{name}.shape", []).append(list(array.shape))
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
    parquet.write_table(table, path, compression="zstd")


def pyarrow_modules() -> tuple[Any, Any]:
    """Return pyarrow and pyarrow.parquet.

    Raises
    ------
    MissingDependency
        If they are not there.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingDependency(
            "Parquet files need pyarrow: pip install 'reltrace[parquet]'"
        ) from error
    return pyarrow, pyarrow.parquet


class _ParquetPart:
    """See `Part`."""

    def __init__(self, path: Path) -> None:
        pyarrow, parquet = pyarrow_modules()
        try:
            self._table = parquet.read_table(path)
        except pyarrow.ArrowInvalid as error:
            raise invalid("path", f"{path} is no part of a batch: {error}") from error
        if (self._table.schema.metadata or {}).get(b"format") != _FORMAT.encode():
            raise invalid("path", f"{path} is no part of a batch")

    def trace(self, row: int) -> Trace:
        def cell(name: str) -> Any:
            return self._table.column(name)[row]

        about = json.loads(cell("about").as_py())
        # Older files have no columns for some.
        there = [name for name in _OWN_COLUMNS if name in self._table.column_names]
        about |= {name: cell(name).as_py() for name in there}
        tensors = {}
        for name, dtype in zip(about["order"], about["dtypes"], strict=True):
            values = cell(name).values.to_numpy(zero_copy_only=False)
            shape = cell(f"{name}.shape").as_py()
            tensors[name] = np.array(values, dtype).reshape(shape)
        return restore(about, tensors)
