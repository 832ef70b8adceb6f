"""The header of a GGUF file (its layout: docs/gguf.md of https://github.com/ggml-org/ggml)."""

from __future__ import annotations

from dataclasses import dataclass
from mmap import mmap
from typing import Any

import numpy as np

_SCALARS = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?",
    10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
_FLOAT32, _STRING, _ARRAY = 6, 8, 9
_VERSIONS = (2, 3)


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where a tensor is in the file: shape in torch's order, type as ggml numbers it."""

    shape: tuple[int, ...]
    kind: int
    offset: int


def read_header(data: mmap) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    """Return metadata and tensors by name; ValueError or KeyError if the file is no whole GGUF."""
    if data[:4] != b"GGUF":
        raise ValueError("it does not begin with the letters GGUF")
    reader = _Reader(data, 4)
    if (version := reader.number("<u4")) not in _VERSIONS:
        raise ValueError(f"its version is {version}; supported: 2, 3, little-endian")
    tensor_count, value_count = reader.numbers("<u8", 2)
    metadata = {reader.text(): reader.value() for _ in range(value_count)}
    tensors = []
    for _ in range(tensor_count):
        name = reader.text()
        shape = tuple(reversed(reader.numbers("<u8", reader.number("<u4"))))
        tensors.append((name, shape, reader.number("<u4"), reader.number("<u8")))
    alignment = metadata.get("general.alignment", 32)
    start = -(-reader.offset // alignment) * alignment
    return metadata, {
        name: GgufTensor(shape, kind, start + offset) for name, shape, kind, offset in tensors
    }


class _Reader:
    """Reads the values of a header one after the other."""

    def __init__(self, data: mmap, offset: int) -> None:
        self._data = data
        self.offset = offset

    def numbers(self, dtype: str, count: int) -> list[Any]:
        values = np.frombuffer(self._data, dtype, count, self.offset)
        self.offset += values.nbytes
        return values.tolist()  # type: ignore[no-any-return]

    def number(self, dtype: str) -> Any:
        return self.numbers(dtype, 1)[0]

    def text(self) -> str:
        start = self.offset + 8
        # Not by `number`, which is slower: a vocabulary may have a million texts.
        length = int.from_bytes(self._data[self.offset : start], "little")
        self.offset = start + length
        if self.offset > len(self._data):
            raise ValueError("a text in it is longer than the file")
        return self._data[start : self.offset].decode()

    def value(self) -> Any:
        kind = self.number("<u4")
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            kind, count = self.number("<u4"), self.number("<u8")
            if kind == _STRING:
                return [self.text() for _ in range(count)]
            return self.numbers(_SCALARS[kind], count)
        value = self.number(_SCALARS[kind])
        # The shortest decimal of a float32: 1e-06, as config.json had it.
        return float(str(np.float32(value))) if kind == _FLOAT32 else value
