"""An atlas on disk: what is merged, of which slices, and the corpus' tokens."""

from __future__ import annotations

import json
import re
import secrets
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from reltrace.atlas.merged import Merged
from reltrace.atlas.slices import firsts
from reltrace.atlas.token_counts import WordCounts
from reltrace.storage.atomic_files import lock_folder, replace_file
from reltrace.storage.tensor_files import write_tensors
from reltrace.types.arrays import Array
from reltrace.types.atlas_shard import SITES, AtlasPart
from reltrace.types.errors import InvalidArgument, TraceError, invalid

_FORMAT = 3
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
        self._file = file
        self._ids = file.get_slice("token_ids")
        self._lengths = file.get_tensor("lengths")
        self._ends = np.cumsum(self._lengths, dtype=np.int64)
        names: list[str] = file.keys()
        self._targets = file.get_tensor("targets") if "targets" in names else None

    def __len__(self) -> int:
        return len(self._lengths)

    def check(self, known: Array) -> None:
        """Raise ValueError if it is not whole.

        Parameters
        ----------
        known : ndarray
            bool [V]: whether the atlas knows a token.
        """
        lengths, ids = self._lengths, self._file.get_tensor("token_ids")
        targets = np.full_like(lengths, -1) if self._targets is None else self._targets
        if len(targets) != len(lengths) or (lengths < 0).any() or lengths.sum() != len(ids):
            raise ValueError("its lengths do not go together")
        for what, found in (("token", ids), ("explained token", targets[targets != -1])):
            wrong = (found < 0) | (found >= len(known))
            wrong |= ~known[np.where(wrong, 0, found)] if len(known) else True
            if wrong.any():
                raise ValueError(f"the atlas has no {what} {found[wrong][0]}")

    def length(self, index: int) -> int:
        """Return how many tokens a prompt has; 0 where it was left out."""
        return int(self._lengths[index])

    def token_ids(self, index: int, start: int = 0, stop: int | None = None) -> Array:
        """Return tokens of a prompt, by default all: int32 [T]."""
        end, length = int(self._ends[index]), self.length(index)
        first = end - length
        stop = length if stop is None else stop
        if start >= stop:
            return np.zeros(0, np.int32)
        found: Array = self._ids[first + start : first + stop]
        return found

    def all_ids(self) -> tuple[Array, Array, Array]:
        """Return tokens of all prompts, int32 [T], and where each begins and ends: int64 [P]."""
        return self._file.get_tensor("token_ids"), self._ends - self._lengths, self._ends

    def target(self, index: int, position: int) -> int:
        """Return the token that is explained at a place of a prompt: by default the next one.

        -1 where none follows, or where the prompt was left out.
        """
        if self._targets is not None:
            return int(self._targets[index])
        following = self.token_ids(index, position + 1, min(position + 2, self.length(index)))
        return int(following[0]) if len(following) else -1


@dataclass(eq=False)
class State:
    """Everything of an atlas but the corpus.

    Attributes
    ----------
    about : dict
        Model, revision, rule, what is explained, places, prompts of a slice at most.
    sites : dict of str to Merged
        Empty before the first slice.
    digests : dict of int to str
        Of the prompts of every slice that is in it.
    vocabulary : dict of int to str
        Texts of the tokens.
    special : set of int
        Those of them that are special tokens.
    skipped : dict of int to str
        Prompts that were left out, by their number in the corpus.
    prompts, tokens : int
        How many were read.
    words : WordCounts
        How often each token is at a place that is counted.
    """

    about: dict[str, Any]
    sites: dict[str, Merged] = field(default_factory=dict)
    digests: dict[int, str] = field(default_factory=dict)
    vocabulary: dict[int, str] = field(default_factory=dict)
    special: set[int] = field(default_factory=set)
    skipped: dict[int, str] = field(default_factory=dict)
    prompts: int = 0
    tokens: int = 0
    words: WordCounts = field(default_factory=WordCounts)

    @property
    def places(self) -> int:
        """Tokens that are counted: not the first of a prompt nor special ones, by default."""
        return int(self.words.places.sum())

    @property
    def next_tokens(self) -> bool:
        """Prompts explain their own next tokens."""
        return self.about["target"] is None

    def firsts(self) -> Array:
        """Return the number of the first prompt of each slice, and of the one that follows."""
        return firsts(1 + max(self.digests, default=-1), self.about["slice"])

    def known_tokens(self) -> Array:
        """Return of which tokens text and counts are known: bool [V]."""
        known = np.zeros(len(self.words.places), bool)
        ids = np.fromiter(self.vocabulary, np.int64, len(self.vocabulary))
        known[ids[(ids >= 0) & (ids < len(known))]] = True
        return known

    def check(self) -> None:
        """Raise ValueError if what is merged does not go together: values, not every text."""
        if len({len(getattr(self.words, name)) for name in _WORDS}) > 1:
            raise ValueError("the counts of tokens differ in length")
        of_slices = self.firsts()
        known = np.zeros(len(of_slices), bool)
        known[list(self.digests)] = True
        for site, merged in self.sites.items():
            lists = merged.values, merged.beside, merged.prompts, merged.tokens
            if len({array.shape for array in lists}) > 1:
                raise ValueError(f"the lists of site {site!r} differ in shape")
            # A layer at a time: of a large model all of them are gigabytes.
            for prompts, tokens in zip(merged.prompts, merged.tokens, strict=True):
                there = prompts >= 0
                if min(prompts.min(initial=-1), tokens.min(initial=-1)) < -1:
                    raise ValueError(f"site {site!r} has places below -1")
                if not np.array_equal(there, tokens >= 0):
                    raise ValueError(f"site {site!r} has tokens without a prompt, or the reverse")
                # Past the last slice is the one that is not known.
                if not known[np.searchsorted(of_slices, prompts[there], "right") - 1].all():
                    raise ValueError(f"site {site!r} names prompts that the corpus does not have")

    def add(self, number: int, digest: str, part: AtlasPart) -> None:
        """Merge a slice."""
        first = int(firsts(number, self.about["slice"])[-1])
        for site in SITES:
            arrays = part.arrays[site]
            shape, bins = arrays["strongest"].shape, arrays["histogram"].shape[-1]
            self.sites.setdefault(site, Merged.empty(shape, bins)).add(arrays, first)
        corpus = part.arrays["corpus"]
        ids, lengths = corpus["token_ids"], corpus["lengths"]
        self.prompts += int(np.count_nonzero(lengths))
        self.tokens += len(ids)
        begins, ends = np.zeros(len(ids), bool), np.zeros(len(ids), bool)
        last = np.cumsum(lengths[lengths > 0], dtype=np.int64) - 1
        ends[last] = True
        begins[last - lengths[lengths > 0] + 1] = True
        counted = np.ones(len(ids), bool)
        if not self.about["keep_special"]:
            counted = ~(begins | np.isin(ids, list(part.special)))
        if self.next_tokens:
            targets = np.roll(ids, -1)[counted & ~ends]
        else:
            targets = corpus["targets"][corpus["targets"] >= 0]
        self.words.add(ids, lengths, counted, targets)
        self.vocabulary |= part.vocabulary
        self.special |= part.special
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
                        "atlas",
                        f"{self.path} is of format {about['format']}, which another version wrote; "
                        f"this one reads format {_FORMAT}: build it again",
                    )
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            state = _state(about, arrays)
            state.check()
            return state
        except FileNotFoundError:
            raise invalid("atlas", f"{self.path} holds none") from None
        except TraceError:
            raise
        except Exception as error:
            # The library has no error of its own that could be named.
            raise self.damaged(str(error)) from error

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
            "special": sorted(state.special),
            "skipped": dict(sorted(state.skipped.items())),
            "prompts": state.prompts,
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
        self._held.enter_context(lock_folder(self.path, _LOCK, "out", busy))

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
            with replace_file(path) as file:
                file.write(known.encode())
        return known

    def end(self) -> None:
        """Note that the atlas is whole."""
        (self.path / _UNFINISHED).unlink(missing_ok=True)

    def write_corpus(self, number: int, part: AtlasPart) -> None:
        """Keep the tokens of a slice; before it is merged, so that none is ever missing."""
        (self.path / _CORPUS).mkdir(parents=True, exist_ok=True)
        arrays = {name: np.ascontiguousarray(a) for name, a in part.arrays["corpus"].items()}
        self._replace(self._corpus_file(number), arrays, {})

    def has_corpus(self, number: int, prompts: int, known: Array) -> bool:
        """Tell whether the tokens of a slice of so many prompts are there, and whole.

        Parameters
        ----------
        number, prompts : int
            Which slice, and of how many.
        known : ndarray
            bool [V]: whether the atlas knows a token.
        """
        try:
            return len(self.corpus(number, known)) == prompts
        except TraceError:
            return False

    def corpus(self, number: int, known: Array | None) -> Corpus:
        """Return the prompts of a slice.

        Parameters
        ----------
        number : int
            Which.
        known : ndarray, optional
            bool [V]: whether the atlas knows a token. Without, what is there is not looked through.

        Raises
        ------
        InvalidArgument
            They are not there, or damaged.
        """
        path = self._corpus_file(number)
        try:
            corpus = Corpus(path)
            if known is not None:
                corpus.check(known)
            return corpus
        except Exception as error:
            # The library has no error of its own that could be named.
            raise invalid("atlas", f"{path} is damaged: {error}") from error

    def damaged(self, why: str) -> InvalidArgument:
        """Return the error of what is merged."""
        return invalid("atlas", f"{self.path / _ATLAS} is damaged: {why}")

    def _corpus_file(self, number: int) -> Path:
        return self.path / _CORPUS / f"{number:06d}.safetensors"

    def _replace(self, path: Path, arrays: dict[str, Array], metadata: dict[str, str]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replace_file(path) as file:
            write_tensors(file, arrays, metadata)


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
        special=set(about["special"]),
        skipped={int(number): why for number, why in about["skipped"].items()},
        prompts=about["prompts"],
        tokens=about["tokens"],
        words=WordCounts(**{name: arrays[f"words/{name}"] for name in _WORDS}),
    )
