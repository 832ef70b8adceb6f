"""An atlas on disk: what is merged, of which slices, and the corpus' tokens."""

from __future__ import annotations

import json
import os
import re
import secrets
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from reltrace._atlas.merged import Merged
from reltrace._atlas.part import SITES, AtlasPart
from reltrace._atlas.words import WordCounts
from reltrace._batch.disk import held, write_whole
from reltrace._errors import TraceError, invalid
from reltrace._trace import Array

_FORMAT = 2
_ATLAS, _CORPUS = "atlas.safetensors", "corpus"
_UNFINISHED, _LOCK = "unfinished", ".lock"
_FIELDS = tuple(field_.name for field_ in fields(Merged))
_WORDS = tuple(field_.name for field_ in fields(WordCounts))


class Corpus:
    """The prompts of one slice; what is asked for is read.

    Parameters
    ----------
    path : path
        Its file.
    """

    def __init__(self, path: Path) -> None:
        from safetensors import safe_open

        # It is mapped, and closed when nobody refers to it any more.
        file: Any = safe_open(path, "np")
        self._ids = file.get_slice("token_ids")
        self._lengths = file.get_tensor("lengths")
        self._ends = np.cumsum(self._lengths, dtype=np.int64)
        self._targets = file.get_tensor("targets")

    def __len__(self) -> int:
        return len(self._lengths)

    def token_ids(self, index: int) -> list[int]:
        """Return the tokens of a prompt; none where it was left out."""
        end, length = int(self._ends[index]), int(self._lengths[index])
        ids: list[int] = self._ids[end - length : end].tolist() if length else []
        return ids

    def target(self, index: int) -> int:
        """Return the token that is explained of a prompt; -1 where it was left out."""
        return int(self._targets[index])


@dataclass(eq=False)
class State:
    """Everything of an atlas but the corpus.

    Attributes
    ----------
    about : dict
        Model, revision, rule, target, places, prompts of a slice.
    sites : dict of str to Merged
        Empty before the first slice.
    digests : dict of int to str
        Of the prompts of every slice that is in it.
    vocabulary : dict of int to str
        Texts of the tokens.
    skipped : dict of int to str
        Prompts that were left out, by their number in the corpus.
    tokens : int
        How many were counted.
    words : WordCounts
        How often each of them.
    """

    about: dict[str, Any]
    sites: dict[str, Merged] = field(default_factory=dict)
    digests: dict[int, str] = field(default_factory=dict)
    vocabulary: dict[int, str] = field(default_factory=dict)
    skipped: dict[int, str] = field(default_factory=dict)
    tokens: int = 0
    words: WordCounts = field(default_factory=WordCounts)

    @property
    def prompts(self) -> int:
        """How many were counted: each that was not left out has one target."""
        return int(self.words.targets.sum())

    def add(self, number: int, digest: str, part: AtlasPart) -> None:
        """Merge a slice."""
        first = number * self.about["slice"]
        for site in SITES:
            arrays = part.arrays[site]
            shape, bins = arrays["strongest"].shape, arrays["histogram"].shape[-1]
            self.sites.setdefault(site, Merged.empty(shape, bins)).add(arrays, first)
        corpus = part.arrays["corpus"]
        self.tokens += int(corpus["lengths"].sum())
        self.words.add(corpus["token_ids"], corpus["lengths"], corpus["targets"])
        self.vocabulary |= part.vocabulary
        self.skipped |= {first + index: why for index, why in part.skipped.items()}
        self.digests[number] = digest


class Folder:
    """Where an atlas is kept. What is merged is one file, replaced in one step."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._held = ExitStack()

    @property
    def exists(self) -> bool:
        """Whether there is an atlas."""
        return (self.path / _ATLAS).exists()

    def read(self) -> State:
        """Read what is merged.

        Raises
        ------
        InvalidArgument
            There is no atlas, or it is damaged.
        """
        from safetensors import safe_open

        path = self.path / _ATLAS
        try:
            with safe_open(path, "np") as file:
                metadata = (file.metadata() or {}).get("atlas")
                if metadata is None:
                    raise invalid("atlas", f"{path} is of safetensors, but holds no atlas")
                about = json.loads(metadata)
                if about["format"] != _FORMAT:
                    raise invalid(
                        "atlas", f"{self.path} is of format {about['format']}, not {_FORMAT}"
                    )
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return _state(about, arrays)
        except FileNotFoundError:
            raise invalid("atlas", f"{self.path} holds none") from None
        except TraceError:
            raise
        except Exception as error:
            # The library has no error of its own that could be named.
            raise invalid("atlas", f"{path} is damaged: {error}") from error

    def write(self, state: State) -> None:
        """Replace what is merged, durably and in one step."""
        arrays = {
            f"{site}/{name}": np.ascontiguousarray(getattr(merged, name))
            for site, merged in state.sites.items()
            for name in _FIELDS
        } | {f"words/{name}": getattr(state.words, name) for name in _WORDS}
        about = {
            "format": _FORMAT,
            "about": state.about,
            "digests": dict(sorted(state.digests.items())),
            "vocabulary": dict(sorted(state.vocabulary.items())),
            "skipped": dict(sorted(state.skipped.items())),
            "tokens": state.tokens,
        }
        self._replace(self.path / _ATLAS, arrays, {"atlas": json.dumps(about)})

    def hold(self) -> None:
        """Keep all others from building here, until `leave`. What is read before may be replaced.

        Raises
        ------
        TraceError
            Another process builds here, or the folder can not be used.
        """
        busy = f"another process builds the atlas in {self.path}; stop it, or choose another folder"
        self._held.enter_context(held(self.path, _LOCK, "out", busy))

    def leave(self) -> None:
        """Let others build here."""
        self._held.close()

    def begin(self) -> str:
        """Note that the atlas is being built; return what tells this building from all others.

        It is the same until `end`, however often the building is broken off.
        """
        path = self.path / _UNFINISHED
        known = path.read_text("ascii", "replace") if path.exists() else ""
        if not re.fullmatch("[0-9a-f]{32}", known):
            known = secrets.token_hex(16)
            write_whole(path, [known.encode()])
        return known

    def end(self) -> None:
        """Note that the atlas is whole."""
        (self.path / _UNFINISHED).unlink(missing_ok=True)

    def write_corpus(self, number: int, part: AtlasPart) -> None:
        """Keep the tokens of a slice; before it is merged, so that none is ever missing."""
        (self.path / _CORPUS).mkdir(parents=True, exist_ok=True)
        arrays = {name: np.ascontiguousarray(a) for name, a in part.arrays["corpus"].items()}
        self._replace(self._corpus_file(number), arrays, {})

    def has_corpus(self, number: int, prompts: int) -> bool:
        """Tell whether the tokens of a slice of so many prompts are there, and whole."""
        try:
            return len(self.corpus(number)) == prompts
        except TraceError:
            return False

    def corpus(self, number: int) -> Corpus:
        """Return the prompts of a slice.

        Raises
        ------
        InvalidArgument
            They are not there, or damaged.
        """
        path = self._corpus_file(number)
        try:
            return Corpus(path)
        except Exception as error:
            # The library has no error of its own that could be named.
            raise invalid("atlas", f"{path} is damaged: {error}") from error

    def _corpus_file(self, number: int) -> Path:
        return self.path / _CORPUS / f"{number:06d}.safetensors"

    def _replace(self, path: Path, arrays: dict[str, Array], metadata: dict[str, str]) -> None:
        # Not at the top: whoever only traces does not need it.
        from safetensors.numpy import save_file

        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(".part")
        save_file(arrays, scratch, metadata)
        with scratch.open("rb") as file:
            os.fsync(file.fileno())
        scratch.replace(path)


def _state(about: dict[str, Any], arrays: dict[str, Array]) -> State:
    return State(
        about=about["about"],
        sites={
            site: Merged(**{name: arrays[f"{site}/{name}"] for name in _FIELDS})
            for site in SITES
            if f"{site}/values" in arrays
        },
        digests={int(number): digest for number, digest in about["digests"].items()},
        vocabulary={int(token): text for token, text in about["vocabulary"].items()},
        skipped={int(number): why for number, why in about["skipped"].items()},
        tokens=about["tokens"],
        words=WordCounts(**{name: arrays[f"words/{name}"] for name in _WORDS}),
    )
