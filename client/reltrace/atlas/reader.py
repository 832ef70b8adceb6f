"""Reads the corpus of an atlas: its prompts, as tokens and as people read them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property, lru_cache

import numpy as np

from reltrace.atlas.folder import Corpus, Folder, State
from reltrace.types.arrays import Array
from reltrace.types.errors import invalid
from reltrace.types.token_text import readable

_SLICES_OPEN = 1024
_PROMPTS_KEPT = 1024


class Reader:
    """The prompts of an atlas by their number in the corpus.

    Parameters
    ----------
    folder : Folder
        Where it is.
    state : State
        What is merged.
    """

    def __init__(self, folder: Folder, state: State) -> None:
        self._folder = folder
        self._state = state
        self._firsts = state.firsts()
        self._checked: set[int] = set()
        self._corpus = lru_cache(_SLICES_OPEN)(self._open)
        self.tokens = lru_cache(_PROMPTS_KEPT)(self._tokens)
        """Return the tokens of a prompt, a tuple of str; none where it was left out."""

    @cached_property
    def folded(self) -> dict[int, str]:
        """The tokens of the vocabulary as people read them, without capitals."""
        return {token: readable(text).casefold() for token, text in self._state.vocabulary.items()}

    @cached_property
    def _known(self) -> Array:
        return self._state.known_tokens()

    def _tokens(self, prompt: int) -> tuple[str, ...]:
        slice_, index = self._place(prompt)
        texts = self._state.vocabulary
        return tuple(map(texts.__getitem__, slice_.token_ids(index).tolist()))

    def tokens_around(self, prompt: int, position: int) -> tuple[str, ...]:
        """Return the tokens of a prompt, of which `position` is one.

        Raises
        ------
        InvalidArgument
            It is not: the atlas is damaged.
        """
        tokens: tuple[str, ...] = self.tokens(prompt)
        self._check(prompt, position, len(tokens))
        return tokens

    def ids_up_to(self, prompt: int, position: int, before: int) -> list[int]:
        """Return the ids of a token of a prompt, the last, and of up to so many before it.

        Raises
        ------
        InvalidArgument
            There is no such token: the atlas is damaged.
        """
        slice_, index = self._place(prompt)
        self._check(prompt, position, slice_.length(index))
        found: list[int] = slice_.token_ids(index, max(0, position - before), position + 1).tolist()
        return found

    def prompts(self, numbers: Array) -> Iterator[tuple[int, list[int], int]]:
        """Yield prompts: number, token ids, and the id of what is explained.

        That is -1 where they explain their own next tokens.

        Parameters
        ----------
        numbers : ndarray
            int64 [N], rising. A slice of the corpus is read at once.
        """
        of_slices = np.searchsorted(self._firsts, numbers, "right") - 1
        for some in np.split(numbers, np.flatnonzero(np.diff(of_slices)) + 1):
            if not len(some):
                continue
            slice_, last = self._place(int(some[-1]))
            first = int(some[-1]) - last
            ids, starts, stops = slice_.all_ids()
            for prompt in some.tolist():
                index = prompt - first
                target = -1 if self._state.next_tokens else slice_.target(index, 0)
                yield prompt, ids[starts[index] : stops[index]].tolist(), target

    def target_id(self, prompt: int, position: int) -> int:
        """Return the token that is explained at a place; -1 where there is none."""
        slice_, index = self._place(prompt)
        return slice_.target(index, position)

    def target(self, prompt: int, position: int) -> str:
        """Return its text; "" where there is none."""
        return self._state.vocabulary.get(self.target_id(prompt, position), "")

    def _place(self, prompt: int) -> tuple[Corpus, int]:
        number = int(np.searchsorted(self._firsts, prompt, "right")) - 1
        if number in self._state.digests:
            slice_, index = self._corpus(number), prompt - int(self._firsts[number])
            if 0 <= index < len(slice_):
                return slice_, index
        raise invalid("number", f"the corpus has no prompt {prompt}")

    def _open(self, number: int) -> Corpus:
        # Each is looked through once, though it may be opened often.
        known = None if number in self._checked else self._known
        corpus = self._folder.corpus(number, known)
        self._checked.add(number)
        return corpus

    def _check(self, prompt: int, position: int, length: int) -> None:
        if not 0 <= position < length:
            raise self._folder.damaged(f"prompt {prompt} has no token {position}")
