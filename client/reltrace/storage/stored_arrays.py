"""Tensors that a worker wrote to a store, read at the first access."""

from __future__ import annotations

import hashlib
import math
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from reltrace_proto.stores import is_below

from reltrace.storage.damaged_files import check_kinds
from reltrace.types.arrays import NUMPY_TYPES, Array, widened
from reltrace.types.errors import MissingDependency, ProtocolError, StoreUnreadable

_ATTEMPTS = 3
_BACKOFF = 0.2
_SHOWN_URL = 200


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor inside the bytes of its job: `offset` is in bytes, `dtype` one of `NUMPY_TYPES`."""

    site: str
    part: str
    dtype: str
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True, slots=True)
class StoredLocation:
    url: str  # of a safetensors file, which may hold the tensors of other jobs too
    offset: int  # of the job's bytes
    length: int
    sha256: str  # of these bytes, in hexadecimal
    tensors: tuple[StoredTensor, ...]

    def check(self, folders: Sequence[str], named_by: str) -> None:
        """Raise StoreUnreadable unless the file is plainly in one of some folders.

        A result says where its tensors are, and what opens URLs opens any.
        """
        if is_below(self.url, folders):
            return
        shown = self.url if len(self.url) <= _SHOWN_URL else f"{self.url[:_SHOWN_URL]}..."
        raise StoreUnreadable(
            f"the tensors are said to be at {shown!r}, which is not plainly in "
            f"{' or '.join(folders) or 'any folder'} ({named_by}); nothing was opened"
        )

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> StoredLocation:
        """Return the location of which `dataclasses.asdict` made a value for JSON.

        Raises any error if it is another value.
        """
        check_kinds(value, {"url": str, "offset": int, "length": int, "sha256": str})
        for tensor in value["tensors"]:
            check_kinds(tensor, {"site": str, "part": str, "dtype": str, "offset": int})
            _check_sizes(tensor["offset"], *tensor["shape"])
        _check_sizes(value["offset"], value["length"])
        tensors = tuple(
            StoredTensor(**{**tensor, "shape": tuple(tensor["shape"])})
            for tensor in value["tensors"]
        )
        return cls(**{**value, "tensors": tensors})


def _check_sizes(*sizes: int) -> None:
    if any(type(size) is not int or size < 0 for size in sizes):
        raise ValueError(f"{sizes} are no sizes")


class StoredArrays(Mapping[str, Mapping[str, Array]]):
    """The arrays of a trace, by site and part, read from their store at the first access.

    For tensors that stay in the store. Those that a server keeps only until the result is
    acknowledged are read before that, by `read_together`. `sites` is their order; by default that
    of the file.
    """

    def __init__(self, location: StoredLocation, sites: Sequence[str] = ()) -> None:
        self.location = location
        self._sites = tuple(sites) or tuple(dict.fromkeys(t.site for t in location.tensors))
        self._arrays: dict[str, dict[str, Array]] | None = None
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[str]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)

    def __contains__(self, site: object) -> bool:
        return site in self._sites

    def __getitem__(self, site: str) -> Mapping[str, Array]:
        if site not in self._sites:
            raise KeyError(site)
        with self._lock:
            if self._arrays is None:
                (self._arrays,) = read_together([self])
            return self._arrays[site]

    def from_bytes(self, data: bytes) -> dict[str, dict[str, Array]]:
        """Return the arrays in the bytes of the job, without a copy where that is possible."""
        arrays: dict[str, dict[str, Array]] = {site: {} for site in self._sites}
        for tensor in self.location.tensors:
            arrays[tensor.site][tensor.part] = _array(tensor, data)
        return arrays

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())


def read_together(
    traces: Sequence[StoredArrays], copy: bool = True
) -> list[dict[str, dict[str, Array]]]:
    """Read the arrays of all traces of one job; its bytes are read once.

    Without `copy` the arrays can not be written to and keep the bytes of the whole job, which then
    are in memory once, not twice. Raises StoreUnreadable if the store can not be reached, or holds
    something else there.
    """
    data = _read(traces[0].location)
    found = [trace.from_bytes(data) for trace in traces]
    if not copy:
        return found
    return [
        {
            # Those that were widened from bfloat16 are copies already.
            site: {part: a if a.flags.writeable else a.copy() for part, a in parts.items()}
            for site, parts in arrays.items()
        }
        for arrays in found
    ]


def _array(tensor: StoredTensor, data: bytes) -> Array:
    dtype = NUMPY_TYPES.get(tensor.dtype)
    if dtype is None:
        raise ProtocolError(f"site {tensor.site!r}: number format {tensor.dtype!r} is unknown")
    count = math.prod(tensor.shape)
    if tensor.offset + count * dtype.itemsize > len(data):
        raise ProtocolError(f"site {tensor.site!r}: its manifest points past the job's bytes")
    values = np.frombuffer(data, dtype, count, tensor.offset).reshape(tensor.shape)
    return widened(values, tensor.dtype)


def _read(location: StoredLocation) -> bytes:
    """Return the bytes of a job; failures of the store that may pass are tried again."""
    from fsspec.core import url_to_fs

    for attempt in range(1, _ATTEMPTS + 1):
        try:
            fs, path = url_to_fs(location.url)
            # Not more than there is: a device, say, has no end.
            size = fs.size(path)
            if size is not None and size < location.offset + location.length:
                data = b""
                break
            with fs.open(path, "rb") as file:
                file.seek(location.offset)
                data = bytes(file.read(location.length))
            break
        except ImportError as error:
            raise MissingDependency(f"the tensors are at {location.url}: {error}") from error
        except Exception as error:
            # Every kind of store has errors of its own.
            if attempt == _ATTEMPTS or isinstance(error, FileNotFoundError):
                raise StoreUnreadable(
                    f"the tensors are at {location.url}, which can not be read from here: {error}"
                ) from error
            time.sleep(_BACKOFF * 2**attempt)
    if len(data) != location.length or hashlib.sha256(data).hexdigest() != location.sha256:
        raise StoreUnreadable(f"{location.url} does not hold what the worker wrote there")
    return data
