"""Readable texts of the tokens of any tokenizer: white space, bytes, invisible characters."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

JOINERS = "\u200c\u200d"
"""Invisible characters that belong to Persian and Indic words, and to emoji."""

# How SentencePiece (U+2581) and byte-level (U+0120, U+010A, U+0109) tokenizers write white space.
_BYTE_LEVEL_SPACE = "\u0120"
_WHITE_SPACE = str.maketrans(
    {"\u2581": " ", _BYTE_LEVEL_SPACE: " ", "\u010a": "\n", "\u0109": "\t"}
)

# How SentencePiece writes a byte without a piece of its own, and how workers write the bytes of a
# token that does not consist of whole characters.
_HEX_BYTES = re.compile(r"<0x((?:[0-9A-F]{2})+)>")

# "<s>", "<|begin_of_text|>", "[CLS]", and single bytes: "<0x0A>".
_SPECIAL = re.compile(r"<[^<>\s]{1,40}>|\[[A-Z]{2,10}\]")

_SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")
_WHITE_SPACE_SIGNS = {"\n": "↵", "\t": "→"}

# Largest number of tokens that share one character, or a chain of them.
_MAX_SHARING = 8

# The size of a few large vocabularies.
_CACHE_SIZE = 1 << 18


class TokenText(NamedTuple):
    """The readable text of a token, which may share characters with its neighbours.

    Attributes
    ----------
    text : str
        The token's text, or the text of all tokens that share its characters.
    number : int
        Number of the token among these, counted from 1.
    shown : str
        The text for the first of these tokens; the number, such as ₂, for the others.
    """

    text: str
    number: int
    shown: str

    @classmethod
    def of(cls, text: str, number: int = 1) -> TokenText:
        """Return it with `shown` filled in."""
        return cls(text, number, text if number == 1 else str(number).translate(_SUBSCRIPTS))


def readable(token: str) -> str:
    """Return a token's text; see `readable_all` for tokens that hold a part of a character."""
    return _decoded(token)[0]


def readable_all(tokens: Sequence[str], part: slice = slice(None)) -> list[str]:
    """Return the texts of the tokens of a text, or of a part of it. See `token_texts`."""
    return [one.shown for one in token_texts(tokens, part)]


def readable_alone(token: str) -> str:
    """Return a token's text where its neighbours are not known.

    The bytes of a partial character are escaped if the token is certainly byte-level; one such as
    "é" may be a letter.
    """
    return escaped_bytes(token) if _BYTE_LEVEL_SPACE in token else readable(token)


def escaped_bytes(token: str) -> str:
    """Return a token's text, with bytes that are not a whole character escaped."""
    text, partial = _decoded(token)
    return text if partial is None else printable(partial.decode(errors="backslashreplace"))


def is_partial_character(token: str) -> bool:
    """Tell whether a token may hold a part of a character."""
    return _decoded(token)[1] is not None


def is_special(token: str) -> bool:
    """Tell whether a token looks like a special token, which has no text."""
    return _SPECIAL.fullmatch(token) is not None


def printable(text: str) -> str:
    """Return a text on one line, without control characters; searches compare this form.

    A line break becomes ↵, a tab →, all other white space a space. Invisible characters, such as
    those that change the direction of a text, are escaped; `JOINERS` stay.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else _printable_char(char) for char in text)


def quoted(text: str) -> str:
    """Return a readable text in quotes; what is already escaped stays as it is."""
    return repr(text).replace("\\\\", "\\")


def visible(text: str) -> str:
    """Return a readable text for a table cell: white space and invisible characters are shown."""
    if text.strip(f" {JOINERS}"):
        return text
    return "".join("␣" if char == " " else repr(char)[1:-1] for char in text)


def visible_token(token: str) -> str:
    """Return a token for a table cell. See `visible`."""
    return visible(readable(token))


def token_texts(tokens: Sequence[str], part: slice = slice(None)) -> list[TokenText]:
    """Return the texts of the tokens of a text, or of a part of it.

    Tokens that share a character are joined (see `join_partial_characters`). If the tokenizer does
    not mark white space, a space is appended to every token.

    Parameters
    ----------
    tokens : sequence of str
        Tokens of the whole text, from which it is known whether white space is marked.
    part : slice
        The tokens to return.
    """
    start, stop, _ = part.indices(len(tokens))
    # The part may begin or end inside a character.
    before = max(0, start - _MAX_SHARING + 1)
    found = join_partial_characters(tokens[before : stop + _MAX_SHARING - 1])
    found = found[start - before : stop - before]
    # Nearly always one of the first tokens has a space.
    if any(" " in one.text for one in found) or any(" " in readable(token) for token in tokens):
        return found
    return [one._replace(shown=f"{one.shown} ") for one in found]


def join_partial_characters(tokens: Sequence[str]) -> list[TokenText]:
    """Return the texts of tokens, those that share a character joined by their bytes."""
    found = [TokenText.of(readable(token)) for token in tokens]
    partials = [_decoded(token)[1] for token in tokens]
    done = 0
    for first, data in enumerate(partials):
        if data is None or first < done:
            continue
        for last in range(first + 1, min(len(partials), first + _MAX_SHARING)):
            more = partials[last]
            if more is None:
                break
            data += more
            try:
                text = printable(data.decode())
            except UnicodeDecodeError:
                continue
            done = last + 1
            found[first:done] = [TokenText.of(text, at + 1) for at in range(done - first)]
            break
        if first >= done:
            found[first] = TokenText.of(readable_alone(tokens[first]))
    return found


def _byte_alphabet() -> dict[str, int]:
    """Return the bytes that the characters of byte-level tokenizers stand for.

    Printable bytes stand for themselves, the others are counted from U+0100 (GPT-2's `encoder.py`).
    """
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printed]
    shifted = {chr(0x100 + index): byte for index, byte in enumerate(others)}
    return {chr(byte): byte for byte in printed} | shifted


_BYTES = _byte_alphabet()


@lru_cache(_CACHE_SIZE)
def _decoded(token: str) -> tuple[str, bytes | None]:
    """Return a token's text, and its bytes if they are not whole characters.

    Such a token may be a byte-level partial character, or a SentencePiece letter such as "é": that
    depends on its neighbours.
    """
    if match := _HEX_BYTES.fullmatch(token):
        data = bytes.fromhex(match[1])
    elif all(char in _BYTES for char in token):
        data = bytes(_BYTES[char] for char in token)
    else:
        return printable(token.translate(_WHITE_SPACE)), None
    try:
        return printable(data.decode()), None
    except UnicodeDecodeError:
        return printable(token.translate(_WHITE_SPACE)), data


def _printable_char(char: str) -> str:
    if char in JOINERS:
        return char
    if sign := _WHITE_SPACE_SIGNS.get(char):
        return sign
    return " " if unicodedata.category(char) == "Zs" else repr(char)[1:-1]
