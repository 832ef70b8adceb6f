"""Labels by a person or a language model: lines of JSON in the folder of the atlas."""

from __future__ import annotations

import codecs
import json
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reltrace.atlas.examples import Feature
from reltrace.atlas.search import folded
from reltrace.storage.atomic_files import replace_file
from reltrace.types.checks import whole_number
from reltrace.types.errors import TraceError, invalid
from reltrace.types.token_text import JOINERS

_FILE = "labels.jsonl"
_EXPORTED_CONTEXTS = 8
_MAX_CHARS = 200
_MAX_LINE_BYTES = 1 << 22

_UNPRINTABLE = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Categories of characters that would move a terminal's cursor, turn the text around them, break a
line, or are no text."""

BUILT_IN = "log-odds"
"""Author of built-in labels."""

Key = tuple[str, int, int]


@dataclass(frozen=True, slots=True)
class ImportedLabel:
    """A label of a neuron or head, and its author; "" if unknown."""

    text: str
    by: str


class ImportedLabels:
    """The labels that were imported into an atlas.

    `check` raises InvalidArgument if the atlas has no such site, layer and index; `made_by` is name
    and revision of its model. Raises InvalidArgument if the file is damaged, or of another model.
    """

    def __init__(
        self, folder: Path, check: Callable[[str, int, int], None], made_by: Sequence[str]
    ) -> None:
        self.made_by = list(made_by)
        self._path = folder / _FILE
        self._check = check
        self._labels: dict[Key, ImportedLabel] = {}
        if self._path.exists():
            with self._path.open("rb") as lines:
                self._labels.update(self._read(lines, str(self._path)))

    def get(self, key: Key) -> ImportedLabel | None:
        return self._labels.get(key)

    def matching(self, text: str) -> set[Key]:
        """Return the features whose label has a text, however it is capitalised."""
        wanted = folded(text)
        return {key for key, label in self._labels.items() if wanted in folded(label.text)}

    def check_other(self, path: Path) -> None:
        """Raise InvalidArgument if a path is that of the imported labels."""
        if path.resolve() == self._path.resolve():
            raise invalid(
                "path", f"{path} is where the atlas keeps its imported labels; choose another"
            )

    def add(self, path: Path, built_in: Callable[[Key], str]) -> int:
        """Import the labels of a file, all or none. See `Atlas.import_labels`."""
        labels = dict(self._labels)
        with path.open("rb") as lines:
            for key, label in self._read(lines, str(path)):
                if label.by == BUILT_IN:
                    if label.text == built_in(key):
                        # Exported, and not changed.
                        continue
                    label = ImportedLabel(label.text, "")
                if label.text:
                    labels[key] = label
                else:
                    labels.pop(key, None)
        changed = sum(self._labels.get(key) != labels.get(key) for key in {*labels, *self._labels})
        self._write(labels)
        self._labels = labels
        return changed

    def _read(self, lines: Iterable[bytes], source: str) -> Iterator[tuple[Key, ImportedLabel]]:
        for number, line in enumerate(lines, 1):
            if number == 1:
                # Written by editors on Windows.
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            try:
                yield self._parsed(line)
            except TraceError as error:
                raise invalid(f"{source}, line {number}", str(error)) from None

    def _parsed(self, line: bytes) -> tuple[Key, ImportedLabel]:
        if len(line) > _MAX_LINE_BYTES:
            raise invalid("line", f"has {len(line)} bytes; allowed: {_MAX_LINE_BYTES}")
        try:
            found: Any = json.loads(line.decode())
        except UnicodeDecodeError as error:
            raise invalid("line", f"is not UTF-8: {error}") from None
        except (ValueError, RecursionError) as error:
            raise invalid("line", f"is no JSON: {error}") from None
        if not isinstance(found, dict):
            raise invalid("line", "must be an object")
        site, layer, index = (
            found.get("site", "neuron"),
            whole_number(found.get("layer"), "layer"),
            whole_number(found.get("index"), "index"),
        )
        self._check(site, layer, index)
        made_by = found.get("made_by", self.made_by)
        if made_by != self.made_by:
            raise invalid(
                "made_by",
                f"is {made_by}, and the atlas is of {self.made_by}: the neurons and heads of "
                "another model or revision are others",
            )
        return (site, layer, index), ImportedLabel(
            _text(found, "label").strip(), _text(found, "by", "")
        )

    def _write(self, labels: dict[Key, ImportedLabel]) -> None:
        with replace_file(self._path) as file:
            for (site, layer, index), label in sorted(labels.items()):
                record = {
                    "site": site,
                    "layer": layer,
                    "index": index,
                    "label": label.text,
                    "by": label.by,
                    "made_by": self.made_by,
                }
                file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")


def _text(record: dict[str, Any], name: str, default: str | None = None) -> str:
    value = record.get(name, default)
    if not isinstance(value, str) or len(value) > _MAX_CHARS or "\n" in value:
        raise invalid(name, f"must be a line of at most {_MAX_CHARS} characters")
    for index, char in enumerate(value):
        if unicodedata.category(char) in _UNPRINTABLE and char not in JOINERS:
            raise invalid(name, f"character {index} is {char!r}: control characters are not text")
    return value


def described(feature: Feature) -> dict[str, Any]:
    return {
        "site": feature.site,
        "layer": feature.layer,
        "index": feature.index,
        "label": feature.label,
        "by": feature.labelled_by,
        "mass": feature.mass,
        "contexts": [
            {
                "relevance": context.relevance,
                "activation": context.activation,
                "text": str(context),
                "token": context.token,
                "target": context.target,
            }
            for context in feature.contexts.first("relevance+", _EXPORTED_CONTEXTS)
        ],
    }
