"""Writes tensors to a store named by a URL, instead of sending them."""

import hashlib
import json
import os
import posixpath
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import fsspec
import torch
from fsspec.core import url_to_fs
from reltrace_proto.stores import folders_of, is_below, leaves_by_link, url_fault
from reltrace_proto.v1 import types_pb2

from reltrace_worker.session.tensors import raw_bytes, scalar_type
from reltrace_worker.types.errors import InvalidJob, PassFailedError, Violation, WorkerError
from reltrace_worker.types.results import SiteTensor

_SAFETENSORS_DTYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int32: "I32",
    torch.int64: "I64",
}


class StoreError(WorkerError):
    """A store can not be used by this worker at all."""


Tensors = Sequence[tuple[SiteTensor, torch.Tensor]]
"""What each tensor is, and its values in the format to send or to store."""


@dataclass(frozen=True, slots=True)
class LargeResults:
    """Where the tensors of jobs go that have more than `above` bytes; no url: all are sent.

    Of those that are sent, a job may have `most` bytes; 0: any number. Jobs may name a folder of
    their own in those of `outputs`, patterns with "{tenant}"; none: the scheduler does not say.
    """

    url: str = ""
    above: int = 0
    most: int = 0
    outputs: tuple[str, ...] = ()

    def output_root(self, uri: str, tenant: str) -> str:
        """Return the folder that the files of a job with an output_uri must not leave.

        Raises `InvalidJob`: it is none that the operator allows. (The scheduler refuses such jobs
        already.)
        """
        if not self.outputs and not url_fault(uri):
            return uri
        for folder in folders_of(self.outputs, tenant):
            if is_below(uri, [folder]):
                return folder
        raise InvalidJob([Violation("output_uri", f"{uri!r} is in no folder allowed here")])

    def has_room(self, size: int) -> bool:
        """Tell whether tensors of so many bytes can be stored, or else sent."""
        return bool(self.url and size > self.above) or not self.most or size <= self.most

    def takes(self, tensors: Tensors) -> bool:
        """Tell whether a job's tensors are to be stored."""
        return bool(self.url) and sum(values.nbytes for _, values in tensors) > self.above

    def check(self) -> None:
        """Raise `StoreError` where the kind of store is unknown, or its package is missing."""
        if not self.url:
            return
        try:
            url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise StoreError(
                f"results larger than {self.above} bytes go to {self.url}: {error}"
            ) from error


def write(
    url: str,
    name: str,
    jobs: Sequence[tuple[str, Tensors]],
    on_step: Callable[[], None] = lambda: None,
    root: str = "",
) -> list[types_pb2.Manifest]:
    """Write the tensors of some jobs, by job id, into one file in the safetensors format.

    A tensor's name in the file is ``<job>/<trace>/<site>`` or ``<job>/<trace>/<site>/<part>``; the
    tensors of a job stand together. `url` is a folder, which is made if it is one of files. It is
    in `root` (default: it is that), which no symbolic link may lead out of.

    Raises `PassFailedError`: the store does not take it: it may later.
    """
    header, manifests = _header_and_manifests(jobs)
    location = posixpath.join(url, name)
    try:
        fs, path = url_to_fs(location)
        local = isinstance(fs, fsspec.implementations.local.LocalFileSystem)
        if leaves_by_link(location, root or url):
            raise PermissionError("a symbolic link leads out of the folder that is allowed")
        if local:
            fs.makedirs(posixpath.dirname(path), exist_ok=True)
        with fs.open(path, "wb") as file:
            file.write(header)
            for (_, tensors), manifest in zip(jobs, manifests, strict=True):
                digest = hashlib.sha256()
                for _, values in tensors:
                    data = raw_bytes(values)
                    digest.update(data)
                    file.write(data)
                    on_step()
                manifest.url = location
                manifest.offset += len(header)
                manifest.sha256 = digest.digest()
            if local:
                # On the disk before its result counts; other stores see to that themselves.
                file.flush()
                os.fsync(file.fileno())
    except Exception as error:
        # Every kind of store has errors of its own.
        raise PassFailedError(f"{location} can not be written: {error}") from error
    return manifests


def _header_and_manifests(
    jobs: Sequence[tuple[str, Tensors]],
) -> tuple[bytes, list[types_pb2.Manifest]]:
    """Return the file's header, and manifests whose offsets do not count the header yet."""
    entries: dict[str, Any] = {"__metadata__": {"format": "reltrace"}}
    manifests = []
    end = 0
    for job_id, tensors in jobs:
        manifest = types_pb2.Manifest(offset=end)
        for tensor, values in tensors:
            names = (job_id, str(tensor.trace), tensor.site, tensor.part)
            entries["/".join(filter(None, names))] = {
                "dtype": _SAFETENSORS_DTYPES[values.dtype],
                "shape": list(values.shape),
                "data_offsets": [end, end + values.nbytes],
            }
            manifest.tensors.add(
                trace=tensor.trace,
                site=tensor.site,
                part=tensor.part,
                dtype=scalar_type(values.dtype),
                shape=values.shape,
                offset=end - manifest.offset,
            )
            end += values.nbytes
        manifest.length = end - manifest.offset
        manifests.append(manifest)
    text = json.dumps(entries, separators=(",", ":")).encode()
    # The format wants what follows to begin at a multiple of eight.
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, manifests
