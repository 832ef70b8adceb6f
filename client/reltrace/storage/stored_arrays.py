"""Tensors that a worker wrote to a store, read when they are looked at."""

from __future__ import annotations

import hashlib
import math
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from reltrace.types.errors import MissingDependency, ProtocolError, StoreUnreadable
from reltrace.types.scalar_types import NUMPY_TYPES, Array, widened

_ATTEMPTS = 3
_BACKOFF = 0.2


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor inside the bytes of its job.

    Attributes
    ----------
    site, part : str
        What it is.
    dtype : str
        One of `NUMPY_TYPES`.
    shape : tuple of int
        Its shape.
    offset : int
        Where it begins, in bytes after the job's first.
    """

    site: str
    part: str
    dtype: str
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True, slots=True)
class Place:
    """Where the tensors of a trace are.

    Attributes
    ----------
    url : str
        Of a file in the safetensors format, which may hold those of other jobs too.
    offset, length : int
        The bytes of the job.
    sha256 : str
        Of these bytes, in hexadecimal.
    tensors : tuple of StoredTensor
        Those of this trace.
    """

    url: str
    offset: int
    length: int
    sha256: str
    tensors: tuple[StoredTensor, ...]

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON holds it."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Place:
        """Return what `to_json` was taken of."""
        tensors = tuple(
            StoredTensor(**{**tensor, "shape": tuple(tensor["shape"])})
            for tensor in value["tensors"]
        )
        return cls(**{**value, "tensors": tensors})


class StoredArrays(Mapping[str, Mapping[str, Array]]):
    """The arrays of a trace, by site and part, read from their place at the first look.

    The place is one where they stay; what a server keeps only until it is acknowledged is read
    before that, by `read_together`.

    Parameters
    ----------
    place : Place
        Where they are.
    sites : sequence of str, optional
        Their order; default: as they stand in the file.
    """

    def __init__(self, place: Place, sites: Sequence[str] = ()) -> None:
        self.place = place
        self._sites = tuple(sites) or tuple(dict.fromkeys(t.site for t in place.tensors))
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
        return self.load()[site]

    def load(self) -> Mapping[str, Mapping[str, Array]]:
        """Read them, if that has not been done.

        Raises
        ------
        StoreUnreadable
            The store can not be reached, or holds something else there.
        """
        with self._lock:
            if self._arrays is None:
                # Copies: arrays that came over the wire can be written to as well.
                self._arrays = _copied(self._arrays_in(_read(self.place)))
            return self._arrays

    def _arrays_in(self, data: bytes) -> dict[str, dict[str, Array]]:
        arrays: dict[str, dict[str, Array]] = {site: {} for site in self._sites}
        for tensor in self.place.tensors:
            arrays[tensor.site][tensor.part] = _array(tensor, data)
        return arrays

    def __getstate__(self) -> dict[str, Any]:
        return {"place": self.place, "_sites": self._sites, "_arrays": self._arrays}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())


def read_together(
    traces: Sequence[StoredArrays], copy: bool = True
) -> list[dict[str, dict[str, Array]]]:
    """Read the arrays of the traces of one job, which have one place; its bytes are read once.

    Parameters
    ----------
    traces : sequence of StoredArrays
        Of the job.
    copy : bool, default True
        False: the arrays can not be written to and keep all bytes of the job, which are then held
        once, not twice.

    Raises
    ------
    StoreUnreadable
        The store can not be reached, or holds something else there.
    """
    data = _read(traces[0].place)
    found = [trace._arrays_in(data) for trace in traces]
    return [_copied(arrays) for arrays in found] if copy else found


def _copied(arrays: dict[str, dict[str, Array]]) -> dict[str, dict[str, Array]]:
    return {
        # Those that were widened from bfloat16 are copies already.
        site: {part: a if a.flags.writeable else a.copy() for part, a in parts.items()}
        for site, parts in arrays.items()
    }


def _array(tensor: StoredTensor, data: bytes) -> Array:
    dtype = NUMPY_TYPES.get(tensor.dtype)
    if dtype is None:
        raise ProtocolError(f"site {tensor.site!r}: number format {tensor.dtype!r} is unknown")
    count = math.prod(tensor.shape)
    if tensor.offset + count * dtype.itemsize > len(data):
        raise ProtocolError(f"site {tensor.site!r}: its manifest points past the job's bytes")
    values = np.frombuffer(data, dtype, count, tensor.offset).reshape(tensor.shape)
    return widened(values, tensor.dtype)


def _read(place: Place) -> bytes:
    """Return the bytes of a job.

    What is kept for others may fail for a moment: it is tried again, quickly.
    """
    import fsspec

    for attempt in range(1, _ATTEMPTS + 1):
        try:
            with fsspec.open(place.url, "rb") as file:
                file.seek(place.offset)
                data = bytes(file.read(place.length))
            break
        except ImportError as error:
            raise MissingDependency(f"the tensors are at {place.url}: {error}") from error
        except Exception as error:
            # Every kind of store has errors of its own.
            if attempt == _ATTEMPTS or isinstance(error, FileNotFoundError):
                raise StoreUnreadable(
                    f"the tensors are at {place.url}, which can not be read from here: {error}"
                ) from error
            time.sleep(_BACKOFF * 2**attempt)
    if len(data) != place.length or hashlib.sha256(data).hexdigest() != place.sha256:
        raise StoreUnreadable(f"{place.url} does not hold what the worker wrote there")
    return data
