"""Reads the corpus of an atlas: its prompts, as tokens and as people read them."""

from __future__ import annotations

from functools import lru_cache

from reltrace._atlas.folder import Corpus, Folder, State
from reltrace._errors import invalid

_SLICES_OPEN = 256
_PROMPTS_KEPT = 4096


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
        self._corpus = lru_cache(_SLICES_OPEN)(folder.corpus)
        self.token_ids = lru_cache(_PROMPTS_KEPT)(self._token_ids)
        """Return the token ids of a prompt, a tuple; none where it was left out."""

    def _token_ids(self, prompt: int) -> tuple[int, ...]:
        slice_, index = self._place(prompt)
        return tuple(slice_.token_ids(index))

    def tokens(self, prompt: int) -> tuple[str, ...]:
        """Return the tokens of a prompt."""
        texts = self._state.vocabulary
        return tuple(texts[token] for token in self.token_ids(prompt))

    def target_id(self, prompt: int) -> int:
        """Return the token that is explained of a prompt; -1 where it was left out."""
        slice_, index = self._place(prompt)
        return slice_.target(index)

    def target(self, prompt: int) -> str:
        """Return its text; "" where the prompt was left out."""
        return self._state.vocabulary.get(self.target_id(prompt), "")

    def _place(self, prompt: int) -> tuple[Corpus, int]:
        number, index = divmod(prompt, self._state.about["slice"])
        if number in self._state.digests:
            slice_ = self._corpus(number)
            if 0 <= index < len(slice_):
                return slice_, index
        raise invalid("number", f"the corpus has no prompt {prompt}")
