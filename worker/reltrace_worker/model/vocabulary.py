"""Readable text for token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_REPLACEMENT = "\ufffd"


class Vocabulary:
    """The texts of a tokenizer's tokens.

    Parameters
    ----------
    tokenizer
        A transformers tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._texts: dict[int, str] = {}

    def text(self, token_id: int) -> str:
        """Return one token as readable text.

        Decoded where that gives valid text; else (a token that holds part of a character, or
        nothing visible) the raw string of the vocabulary, and for an id that the tokenizer does
        not know ``"<id>"`` with its number.
        """
        text = self._texts.get(token_id)
        if text is None:
            text = self._texts[token_id] = self._readable(token_id)
        return text

    def _readable(self, token_id: int) -> str:
        raw = self._tokenizer.convert_ids_to_tokens(token_id)
        if raw is None:
            return f"<{token_id}>"
        decoded: str = self._tokenizer.decode([token_id], clean_up_tokenization_spaces=False)
        if not decoded or _REPLACEMENT in decoded:
            return str(raw)
        # Sentencepiece decoders strip the space that begins a word; the vocabulary has it.
        if str(raw).startswith("▁") and not decoded.startswith(" "):
            return f" {decoded}"
        return decoded

    def texts(self, token_ids: Sequence[int]) -> tuple[str, ...]:
        """Return :meth:`text` of each token."""
        return tuple(self.text(token_id) for token_id in token_ids)

    def decoded(self, token_ids: Sequence[int]) -> str:
        """Return what was written, decoded together, without special tokens."""
        decoded: str = self._tokenizer.decode(
            list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return decoded

    def joined(self, token_ids: Sequence[int]) -> str:
        """Return several tokens as one text, decoded together."""
        decoded: str = self._tokenizer.decode(list(token_ids), clean_up_tokenization_spaces=False)
        return decoded or "".join(self.texts(token_ids))
