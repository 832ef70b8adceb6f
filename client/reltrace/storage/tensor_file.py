"""Files of tensors in the safetensors format, written piece by piece.

The library that reads them writes them too, but of a large atlas it leaves a file of its own behind
where it is killed, keeps others than the owner from reading, and calls a full disk by no name that
could be caught.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from reltrace.storage.atomic_files import named
from reltrace.types.trace import Array

_DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip

_ALIGNED = 8
"""Bytes: where the tensors begin, and, the widest numbers first, each of them."""


def write_tensors(
    path: Path, tensors: Mapping[str, Array], metadata: Mapping[str, str], *, durable: bool = False
) -> None:
    """Write a file.

    Parameters
    ----------
    path : path
        One that is there is written over.
    tensors : mapping of str to ndarray
        By name.
    metadata : mapping of str to str
        What is beside them.
    durable : bool
        Return when it is on the disk.

    Raises
    ------
    OSError
        Naming the file, if it can not be written: the disk is full, say. A part of it may be there.
    """
    order = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, array in order:
        begin, end = end, end + array.nbytes
        header[name] = {
            "dtype": _DTYPES[array.dtype.name],
            "shape": array.shape,
            "data_offsets": [begin, end],
        }
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % _ALIGNED)
    with named(path), path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for _, array in order:
            little = array.astype(array.dtype.newbyteorder("<"), copy=False)
            file.write(np.ascontiguousarray(little).reshape(-1).view(np.uint8).data)
        if durable:
            file.flush()
            os.fsync(file.fileno())


def replace_tensors(
    path: Path,
    tensors: Mapping[str, Array],
    metadata: Mapping[str, str],
    unfinished: Path,
    *,
    durable: bool = False,
) -> None:
    """Write a file in one step: who reads it sees the old one or the new one.

    Parameters
    ----------
    path, tensors, metadata, durable
        As of `write_tensors`.
    unfinished : path
        In the same folder: what it is until it is whole. Nothing is left of it, unless by a kill.

    Raises
    ------
    OSError
        Naming the file, if it can not be written; the old one is as it was.
    """
    try:
        write_tensors(unfinished, tensors, metadata, durable=durable)
        unfinished.replace(path)
    except BaseException as error:
        unfinished.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, os.fspath(path)) from error
        raise
