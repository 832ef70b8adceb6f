"""Prompts as a model reads them: tokens and their positions in the text."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Turn:
    """A turn of a conversation in the tokens of a prompt.

    Attributes
    ----------
    role : str
        As in the message: "system", "user", "assistant".
    first, stop : int
        Tokens `first` to ``stop - 1`` hold the content of the message, without what the chat
        template puts around it.
    """

    role: str
    first: int
    stop: int


@dataclass(frozen=True, eq=False, slots=True)
class Tokens:
    """A prompt as a model reads it.

    Attributes
    ----------
    token_ids : list of int
        Ids of the T tokens.
    tokens : list of str
        The tokens, named as in `Trace.tokens`.
    offsets : ndarray of int64, shape [T, 2]
        First and stop of each token's characters in `text`. Tokens that share a character have
        the same span; a token without text has an empty one.
    text : str
        The text with special tokens; for a conversation, the output of the model's chat template.
    turns : tuple of Turn
        The turns of a conversation.
    hints : tuple of str
        Warnings about how the prompt was read, in sentences.
    special_positions : tuple of int
        Positions of the tokenizer's special tokens.
    """

    token_ids: list[int]
    tokens: list[str]
    offsets: NDArray[np.int64]
    text: str
    turns: tuple[Turn, ...] = ()
    hints: tuple[str, ...] = ()
    special_positions: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.token_ids)

    def __repr__(self) -> str:
        return f"Tokens({len(self)} tokens of {self.text!r})"

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain lists and numbers, ready for `json.dumps`."""
        return {
            "token_ids": self.token_ids,
            "tokens": self.tokens,
            "offsets": self.offsets.tolist(),
            "text": self.text,
            "turns": [asdict(turn) for turn in self.turns],
            "hints": list(self.hints),
            "special_positions": list(self.special_positions),
        }


class FirstTokenShare(NamedTuple):
    """The share of |R| at the first token of a prompt, from 0 to 1.

    Attributes
    ----------
    total : float
        Share of the sum of |R| over all layers and tokens.
    layers : ndarray of float64, shape [L]
        Share of each layer's sum; one value at a site without layers.
    """

    total: float
    layers: NDArray[np.float64]
