"""Readable text for token ids."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

# What a decoder writes for bytes that are no whole character.
REPLACEMENT = "\ufffd"

# How byte-level tokenizers write each byte in their vocabulary.
_CHARACTER_OF = bytes_to_unicode()  # type: ignore[no-untyped-call]
_BYTE_OF = {character: byte for byte, character in _CHARACTER_OF.items()}
_HEX_BYTES = re.compile(r"<0x((?:[0-9A-F]{2})+)>")
_NUMBER = re.compile(r"<#?(\d{1,9})>", re.ASCII)


class Vocabulary:
    """A name for each token of a tokenizer; no two tokens have the same.

    A token is named by its decoded text. A byte-level one that is no whole character is named by
    its bytes, ``<0xC3>``, as SentencePiece writes one: its raw string, "Ã", reads as another text.
    Where the decoded text is empty, or that of another token (SentencePiece has a byte ``<0x0A>``
    beside a line break), the name is the raw string in the vocabulary; where that is another
    token's text, it is ``"<id>"`` with the number.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._backend = backend = tokenizer.backend_tokenizer
        self._names: dict[int, str] = {}
        # A decoder of SentencePiece drops the space of the first token: a letter goes before it.
        letters = (backend.token_to_id(chr(code)) for code in range(ord("a"), ord("z") + 1))
        self._anchor = [next((i for i in letters if i is not None), 0)]
        self._anchor_length = len(backend.decode(self._anchor, skip_special_tokens=False))
        self.special_ids = frozenset(tokenizer.all_special_ids) | {
            index for index, token in tokenizer.added_tokens_decoder.items() if token.special
        }

    def text(self, token_id: int) -> str:
        """Return the name of one token."""
        if token_id not in self._names:
            self._names[token_id] = self._name(token_id)
        return self._names[token_id]

    def texts(self, token_ids: Sequence[int]) -> tuple[str, ...]:
        """Return the name of each token."""
        return tuple(self.text(token_id) for token_id in token_ids)

    def find(self, text: str) -> int | None:
        """Return the token of which this is the name; None: there is none."""
        token: int | None = self._token_decoding_to(text)
        if token is None:
            token = self._backend.token_to_id(text)
        if token is None and (in_hex := _HEX_BYTES.fullmatch(text)):
            raw = "".join(_CHARACTER_OF[byte] for byte in bytes.fromhex(in_hex[1]))
            token = self._backend.token_to_id(raw)
        if token is None and (number := _NUMBER.fullmatch(text)):
            token = int(number[1])
        return token if token is not None and self.text(token) == text else None

    def decoded(self, token_ids: Sequence[int]) -> str:
        """Return the text of tokens, decoded together, without special tokens."""
        return self._decode([i for i in token_ids if i not in self.special_ids])

    def joined(self, token_ids: Sequence[int]) -> str:
        """Return the text of tokens, decoded together, or else their names."""
        return self._decode(token_ids) or "".join(self.texts(token_ids))

    def _name(self, token_id: int) -> str:
        raw: str | None = self._backend.id_to_token(token_id)
        if raw is not None:
            decoded = self._decode([token_id])
            if self._token_decoding_to(decoded) == token_id:
                return decoded
            name = _in_hex(raw) if REPLACEMENT in decoded else raw
            is_free = self._backend.token_to_id(name) in (None, token_id)
            if is_free and self._token_decoding_to(name) is None:
                return name
        number = f"<{token_id}>"
        return number if self._backend.token_to_id(number) is None else f"<#{token_id}>"

    def _token_decoding_to(self, text: str) -> int | None:
        if not text or REPLACEMENT in text:
            return None
        for spelling in _spellings(text):
            token: int | None = self._backend.token_to_id(spelling)
            if token is not None and self._decode([token]) == text:
                return token
        return None

    def _decode(self, token_ids: Sequence[int]) -> str:
        decoded: str = self._backend.decode([*self._anchor, *token_ids], skip_special_tokens=False)
        return decoded[self._anchor_length :]


def _in_hex(raw: str) -> str:
    """Return a part of a character by its bytes; SentencePiece writes it like this already."""
    if raw.isascii() or not all(character in _BYTE_OF for character in raw):
        return raw
    return f"<0x{bytes(_BYTE_OF[character] for character in raw).hex().upper()}>"


def _spellings(text: str) -> Iterator[str]:
    """Yield how vocabularies write a token of this text, the plainest first."""
    yield text
    yield text.replace(" ", "▁")
    data = text.encode()
    yield "".join(_CHARACTER_OF[byte] for byte in data)
    if len(data) == 1:
        yield f"<0x{data[0]:02X}>"
