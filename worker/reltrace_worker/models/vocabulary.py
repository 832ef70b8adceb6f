"""Readable text for token ids."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

_REPLACEMENT = "\ufffd"

# How byte-level tokenizers write each byte in their vocabulary.
_BYTES = bytes_to_unicode()  # type: ignore[no-untyped-call]
_BYTE_OF = {char: byte for byte, char in _BYTES.items()}
_WRITTEN_BYTES = re.compile(r"<0x((?:[0-9A-F]{2})+)>")


class Vocabulary:
    """The texts of a tokenizer's tokens, each of its own: a text names one token.

    A token is named by its decoded text. A byte-level one that is no whole character is named by
    its bytes, ``<0xC3>``, as SentencePiece writes one: its raw string, "Ã", reads as another text.
    Where the decoded text is nothing at all, or that of another token (SentencePiece has a byte
    ``<0x0A>`` beside a line break), it is named by its raw string in the vocabulary; where that is
    another's text, by ``"<id>"`` with its number.

    Parameters
    ----------
    tokenizer
        A transformers tokenizer with a backend of the ``tokenizers`` library.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._backend = backend = tokenizer.backend_tokenizer
        self._names: dict[int, str] = {}
        # A decoder of SentencePiece drops a space that comes first: nothing is.
        letters = (backend.token_to_id(chr(code)) for code in range(ord("a"), ord("z") + 1))
        self._anchor = [next((i for i in letters if i is not None), 0)]
        self._anchored = len(backend.decode(self._anchor, skip_special_tokens=False))
        self.special_ids = frozenset(tokenizer.all_special_ids) | {
            index for index, token in tokenizer.added_tokens_decoder.items() if token.special
        }

    def text(self, token_id: int) -> str:
        """Return the name of one token."""
        name = self._names.get(token_id)
        if name is None:
            name = self._names[token_id] = self._name(token_id)
        return name

    def texts(self, token_ids: Sequence[int]) -> tuple[str, ...]:
        """Return :meth:`text` of each token."""
        return tuple(self.text(token_id) for token_id in token_ids)

    def find(self, text: str) -> int | None:
        """Return the token of which :meth:`text` is this; None: there is none."""
        found: int | None = self._decoding_to(text)
        if found is None:
            found = self._backend.token_to_id(text)
        if found is None and (written := _WRITTEN_BYTES.fullmatch(text)):
            raw = "".join(_BYTES[byte] for byte in bytes.fromhex(written[1]))
            found = self._backend.token_to_id(raw)
        if found is None and (numbered := re.fullmatch(r"<#?(\d{1,9})>", text, re.ASCII)):
            found = int(numbered[1])
        return found if found is not None and self.text(found) == text else None

    def decoded(self, token_ids: Sequence[int]) -> str:
        """Return what was written, decoded together, without special tokens."""
        return self._decode([i for i in token_ids if i not in self.special_ids])

    def joined(self, token_ids: Sequence[int]) -> str:
        """Return several tokens as one text, decoded together."""
        return self._decode(token_ids) or "".join(self.texts(token_ids))

    def _name(self, token_id: int) -> str:
        raw: str | None = self._backend.id_to_token(token_id)
        if raw is not None:
            decoded = self._decode([token_id])
            if self._decoding_to(decoded) == token_id:
                return decoded
            name = _written_bytes(raw) if _REPLACEMENT in decoded else raw
            other = self._backend.token_to_id(name)
            if self._decoding_to(name) is None and other in (None, token_id):
                return name
        number = f"<{token_id}>"
        return number if self._backend.token_to_id(number) is None else f"<#{token_id}>"

    def _decoding_to(self, text: str) -> int | None:
        """Return the token that a text names by what it decodes to."""
        if not text or _REPLACEMENT in text:
            return None
        for spelling in _spellings(text):
            token: int | None = self._backend.token_to_id(spelling)
            if token is not None and self._decode([token]) == text:
                return token
        return None

    def _decode(self, token_ids: Sequence[int]) -> str:
        decoded: str = self._backend.decode([*self._anchor, *token_ids], skip_special_tokens=False)
        return decoded[self._anchored :]


def _written_bytes(raw: str) -> str:
    """Return a part of a character by its bytes; one of SentencePiece is written so already."""
    if raw.isascii() or not all(char in _BYTE_OF for char in raw):
        return raw
    return f"<0x{bytes(_BYTE_OF[char] for char in raw).hex().upper()}>"


def _spellings(text: str) -> Iterator[str]:
    """Yield how vocabularies write a token of this text, the plainest first."""
    yield text
    yield text.replace(" ", "▁")
    data = text.encode()
    yield "".join(_BYTES[byte] for byte in data)
    if len(data) == 1:
        yield f"<0x{data[0]:02X}>"
