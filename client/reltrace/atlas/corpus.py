"""The corpus of an atlas: the tokens of its prompts, a file for each slice."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from reltrace.atlas.folder import ATLAS, CORPUS, damaged
from reltrace.atlas.state import State
from reltrace.storage.atomic_files import replace_file
from reltrace.storage.tensor_files import write_tensors
from reltrace.types.arrays import Array
from reltrace.types.atlas_shard import AtlasShard
from reltrace.types.errors import invalid
from reltrace.types.token_text import readable

_OPEN_SLICES = 1024
_CACHED_PROMPTS = 1024


class CorpusSlice:
    """The prompts of one slice, read from its file as needed."""

    def __init__(self, path: Path, known_tokens: Array) -> None:
        from safetensors import safe_open

        # Memory-mapped; closed when it is garbage-collected.
        file: Any = safe_open(path, "np")
        self._file = file
        self._ids = file.get_slice("token_ids")
        self._lengths = file.get_tensor("lengths")
        self._ends = np.cumsum(self._lengths, dtype=np.int64)
        names: list[str] = file.keys()
        self._targets = file.get_tensor("targets") if "targets" in names else None
        self._check(known_tokens)

    def __len__(self) -> int:
        return len(self._lengths)

    def _check(self, known_tokens: Array) -> None:
        """Raise ValueError if the file is damaged. See `State.known_tokens`."""
        lengths, ids = self._lengths, self._file.get_tensor("token_ids")
        targets = np.full_like(lengths, -1) if self._targets is None else self._targets
        if len(targets) != len(lengths) or (lengths < 0).any() or lengths.sum() != len(ids):
            raise ValueError("its lengths do not go together")
        for what, found in (("token", ids), ("explained token", targets[targets != -1])):
            wrong = (found < 0) | (found >= len(known_tokens))
            wrong |= ~known_tokens[np.where(wrong, 0, found)] if len(known_tokens) else True
            if wrong.any():
                raise ValueError(f"the atlas has no {what} {found[wrong][0]}")

    def length(self, index: int) -> int:
        return int(self._lengths[index])

    def token_ids(self, index: int, start: int = 0, stop: int | None = None) -> Array:
        """Return tokens of a prompt, by default all: int32 [T]."""
        length = self.length(index)
        first = int(self._ends[index]) - length
        part = range(length)[start:stop]
        if not part:
            return np.zeros(0, np.int32)
        found: Array = self._ids[first + part.start : first + part.stop]
        return found

    def all_ids(self) -> tuple[Array, Array, Array]:
        """Return tokens of all prompts, int32 [T], and where each begins and ends: int64 [P]."""
        return self._file.get_tensor("token_ids"), self._ends - self._lengths, self._ends

    def target(self, index: int, position: int) -> int:
        """Return the token that is explained at a position of a prompt: by default the next one.

        -1 where none follows, or where the prompt was left out.
        """
        if self._targets is not None:
            return int(self._targets[index])
        following = self.token_ids(index, position + 1, position + 2)
        return int(following[0]) if len(following) else -1


def write_slice(folder: Path, number: int, shard: AtlasShard) -> None:
    """Keep the tokens of a slice; before it is merged, so that they are never missing."""
    path = _path(folder, number)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(path) as file:
        write_tensors(file, shard.arrays["corpus"], {})


def open_slice(folder: Path, number: int, known_tokens: Array) -> CorpusSlice:
    """Open the tokens of a slice; raise InvalidArgument if they are missing or damaged."""
    path = _path(folder, number)
    try:
        return CorpusSlice(path, known_tokens)
    except Exception as error:
        # Reading a damaged file may raise any error.
        raise damaged(path, error) from error


def _path(folder: Path, number: int) -> Path:
    return folder / CORPUS / f"{number:06d}.safetensors"


class Corpus:
    """The prompts of an atlas, by their numbers.

    Its methods raise InvalidArgument if the corpus is damaged, or has no such prompt.
    """

    def __init__(self, folder: Path, state: State) -> None:
        self._folder = folder
        self._state = state
        self._slice_starts = state.first_prompts()
        self._slice = lru_cache(_OPEN_SLICES)(self._open)
        self.tokens = lru_cache(_CACHED_PROMPTS)(self._tokens)
        """Return the tokens of a prompt, a tuple of str; none where it was left out."""

    @cached_property
    def folded(self) -> dict[int, str]:
        """Readable texts of the tokens, without capitals."""
        return {token: readable(text).casefold() for token, text in self._state.vocabulary.items()}

    @cached_property
    def _known_tokens(self) -> Array:
        return self._state.known_tokens()

    def _tokens(self, prompt: int) -> tuple[str, ...]:
        found, index = self._find(prompt)
        texts = self._state.vocabulary
        return tuple(map(texts.__getitem__, found.token_ids(index).tolist()))

    def context(self, prompt: int, position: int) -> tuple[tuple[str, ...], str]:
        """Return the tokens of a prompt, and the one that is explained at a position; "": none."""
        tokens: tuple[str, ...] = self.tokens(prompt)
        self._check(prompt, position, len(tokens))
        return tokens, self._state.vocabulary.get(self.target_id(prompt, position), "")

    def ids_up_to(self, prompt: int, position: int, before: int) -> list[int]:
        """Return the ids of up to `before` tokens before a position, and of the token there."""
        slice_, index = self._find(prompt)
        self._check(prompt, position, slice_.length(index))
        found: list[int] = slice_.token_ids(index, max(0, position - before), position + 1).tolist()
        return found

    def prompts(self, numbers: Array) -> Iterator[tuple[int, list[int], int]]:
        """Yield number, token ids and explained token of prompts; int64 [N], rising.

        The explained token is -1 where prompts explain their own next tokens.
        """
        in_slice = np.searchsorted(self._slice_starts, numbers, "right") - 1
        for group in np.split(numbers, np.flatnonzero(np.diff(in_slice)) + 1):
            if not len(group):
                continue
            slice_, last = self._find(int(group[-1]))
            first = int(group[-1]) - last
            ids, starts, stops = slice_.all_ids()
            for prompt in group.tolist():
                index = prompt - first
                target = -1 if self._state.next_tokens else slice_.target(index, 0)
                yield prompt, ids[starts[index] : stops[index]].tolist(), target

    def target_id(self, prompt: int, position: int) -> int:
        """Return the token that is explained at a position; -1 where there is none."""
        slice_, index = self._find(prompt)
        return slice_.target(index, position)

    def _find(self, prompt: int) -> tuple[CorpusSlice, int]:
        """Return the slice of a prompt, and the prompt's index in it."""
        number = int(np.searchsorted(self._slice_starts, prompt, "right")) - 1
        if number in self._state.digests:
            found, index = self._slice(number), prompt - int(self._slice_starts[number])
            if 0 <= index < len(found):
                return found, index
        raise invalid("number", f"the corpus has no prompt {prompt}")

    def _open(self, number: int) -> CorpusSlice:
        return open_slice(self._folder, number, self._known_tokens)

    def _check(self, prompt: int, position: int, length: int) -> None:
        if not 0 <= position < length:
            raise damaged(self._folder / ATLAS, f"prompt {prompt} has no token {position}")
