"""Readable text for token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

_REPLACEMENT = "\ufffd"
_SPACE = "▁"
"""How SentencePiece writes a space in its vocabulary."""


class Vocabulary:
    """The texts of a tokenizer's tokens, each of its own: a text names one token.

    A token is named by its decoded text. Where that is no whole character, nothing at all, or the
    text of another token (SentencePiece has a byte ``<0x0A>`` beside a line break), it is named by
    its raw string in the vocabulary; where that is taken too, by ``"<id>"`` with its number.

    Parameters
    ----------
    tokenizer
        A transformers tokenizer with a backend of the ``tokenizers`` library.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._backend = tokenizer.backend_tokenizer
        raw = {index: piece for piece, index in self._backend.get_vocab().items()}
        self._anchor = next(
            ([i] for i, piece in sorted(raw.items()) if len(piece) == 1 and "a" <= piece <= "z"), []
        )
        self._anchored = 0
        self._anchored = len(self._decode([]))
        self._names = _names(raw, self._decode_each(sorted(raw)))
        self._ids = {name: index for index, name in self._names.items()}
        self.special_ids = frozenset(tokenizer.all_special_ids) | {
            index for index, token in tokenizer.added_tokens_decoder.items() if token.special
        }

    @staticmethod
    def of(tokenizer: Any) -> Vocabulary:
        """Return the vocabulary of a tokenizer, made once: its names are as many as its tokens."""
        found = _VOCABULARIES.get(tokenizer)
        if found is None:
            found = _VOCABULARIES[tokenizer] = Vocabulary(tokenizer)
        return found

    def text(self, token_id: int) -> str:
        """Return the name of one token; ``"<id>"`` of one that the tokenizer does not have."""
        return self._names.get(token_id) or f"<{token_id}>"

    def texts(self, token_ids: Sequence[int]) -> tuple[str, ...]:
        """Return :meth:`text` of each token."""
        return tuple(self.text(token_id) for token_id in token_ids)

    def find(self, text: str) -> int | None:
        """Return the token of which :meth:`text` is this; None: there is none."""
        found = self._ids.get(text)
        number = text[1:-1]
        if found is None and number.isascii() and number.isdecimal() and len(number) < 10:
            return int(number) if self.text(int(number)) == text else None
        return found

    def decoded(self, token_ids: Sequence[int]) -> str:
        """Return what was written, decoded together, without special tokens."""
        return self._decode([i for i in token_ids if i not in self.special_ids])

    def joined(self, token_ids: Sequence[int]) -> str:
        """Return several tokens as one text, decoded together."""
        return self._decode(token_ids) or "".join(self.texts(token_ids))

    def _decode(self, token_ids: Sequence[int]) -> str:
        # Behind another token: a decoder of SentencePiece drops a space that comes first.
        ids = [*self._anchor, *token_ids]
        decoded: str = self._backend.decode(ids, skip_special_tokens=False)
        return decoded[self._anchored :]

    def _decode_each(self, token_ids: Sequence[int]) -> dict[int, str]:
        behind = [[*self._anchor, i] for i in token_ids]
        decoded = self._backend.decode_batch(behind, skip_special_tokens=False)
        return {i: text[self._anchored :] for i, text in zip(token_ids, decoded, strict=True)}


_VOCABULARIES: WeakKeyDictionary[Any, Vocabulary] = WeakKeyDictionary()


def _names(raw: dict[int, str], decoded: dict[int, str]) -> dict[int, str]:
    """Return a name of its own for each token, by rising id."""

    def spelled(index: int) -> bool:
        return raw[index].replace(_SPACE, " ") == decoded[index]

    claims: dict[str, int] = {}
    for index, text in decoded.items():
        if not text or _REPLACEMENT in text:
            continue
        other = claims.setdefault(text, index)
        if other != index and spelled(index) and not spelled(other):
            claims[text] = index
    names: dict[int, str] = {}
    taken = set(claims)
    for index, text in decoded.items():
        name = text
        if claims.get(text) != index:
            name = raw[index]
            while name in taken:
                name = f"<{index}>" if name == raw[index] else f"<{name}>"
            taken.add(name)
        names[index] = name
    return names
