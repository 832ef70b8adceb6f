"""Results as workers leave them in a store: tensors in a file, a manifest in the chunk."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from fake_results import chunks_of
from reltrace.storage import stored_arrays as stored
from reltrace_proto.v1 import types_pb2


class Store:
    """A folder for tensors, and what is read of it."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.reads: list[str] = []
        read = stored._read

        def noted(place: stored.StoredLocation) -> bytes:
            self.reads.append(place.url)
            return read(place)

        monkeypatch.setattr(stored, "_read", noted)

    def run(self, spec: types_pb2.JobSpec, job_id: str) -> list[types_pb2.ResultChunk]:
        """Give a job's result as one chunk, its tensors behind some bytes of others."""
        chunks = chunks_of(spec, job_id, 1 << 20)
        path = self.folder / f"{job_id}.1.safetensors"
        data = b"".join(piece.data for chunk in chunks for piece in chunk.tensors)
        path.write_bytes(b"others" + data)
        chunk = types_pb2.ResultChunk(job_id=job_id, number=1, header=chunks[0].header)
        chunk.manifest.url = path.as_uri()
        chunk.manifest.offset = 6
        chunk.manifest.length = len(data)
        chunk.manifest.sha256 = hashlib.sha256(data).digest()
        offset = 0
        for each in chunks:
            for piece in each.tensors:
                chunk.manifest.tensors.add(
                    trace=piece.trace, site=piece.site, part=piece.part, dtype=piece.dtype,
                    shape=piece.shape, offset=offset,
                )  # fmt: skip
                offset += len(piece.data)
        chunk.end.CopyFrom(chunks[-1].end)
        return [chunk]

    def file(self, job_id: str) -> Path:
        return self.folder / f"{job_id}.1.safetensors"

    def clear(self) -> None:
        """Delete all, as the server does once results are acknowledged."""
        for path in self.folder.iterdir():
            path.unlink()
