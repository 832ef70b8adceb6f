"""What pictures of a trace share: readable tokens, colours, what a token's own colour shows."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from reltrace.types.errors import invalid
from reltrace.types.trace import SITES_WITHOUT_LAYERS, Array, Trace

# The ends of ColorBrewer's RdBu, which people with any kind of colour blindness tell apart,
# and its middle.
NEGATIVE = (33, 102, 172)
ZERO = (255, 255, 255)
POSITIVE = (178, 24, 43)

# How SentencePiece (U+2581) and byte-level (U+0120, U+010A, U+0109) tokenizers write white space.
_WHITE_SPACE = str.maketrans({"\u2581": " ", "\u0120": " ", "\u010a": "\n", "\u0109": "\t"})

# How SentencePiece writes a byte that no piece has, in Llama 2 a line break; and workers the bytes
# of any token that is no whole character.
_WRITTEN_BYTES = re.compile(r"<0x((?:[0-9A-F]{2})+)>")

# How byte-level tokenizers write a space.
_BYTE_LEVEL_SPACE = "\u0120"

# Tokens in a row of which each shares a character with the next: of one character at most 4.
_MOST_PARTS = 8

_SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")

# What is shown of white space that is not a space.
_SIGNS = {"\n": "↵", "\t": "→"}

# Parts of Persian and Indic words, and of emoji: not seen, and the text is not itself without them.
JOINERS = "\u200c\u200d"

# Texts of tokens that are kept: what a few large vocabularies have.
_KEPT = 1 << 18

# Sites whose first layer is nearest to the input; the others add to the stream layer by layer.
STREAM_SITES = frozenset({"resid", "resid_mid"})


def _byte_alphabet() -> dict[str, int]:
    """Return the bytes that the characters of byte-level tokenizers stand for.

    Bytes that print are themselves, the others are counted on from U+0100: GPT-2's `encoder.py`.
    """
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printed]
    shifted = {chr(0x100 + index): byte for index, byte in enumerate(others)}
    return {chr(byte): byte for byte in printed} | shifted


_BYTES = _byte_alphabet()


def _bytes_of(token: str) -> bytes | None:
    """Return the bytes that a token stands for; None: it is written as text."""
    if written := _WRITTEN_BYTES.fullmatch(token):
        return bytes.fromhex(written[1])
    try:
        return bytes(_BYTES[char] for char in token)
    except KeyError:
        return None


@lru_cache(_KEPT)
def readable(token: str) -> str:
    """Return a token as people read it: what `printable` makes of its text.

    Of a token that holds a part of a character, see `readable_all`.
    """
    try:
        data = _bytes_of(token)
        return printable(token.translate(_WHITE_SPACE) if data is None else data.decode())
    except UnicodeDecodeError:
        return printable(token.translate(_WHITE_SPACE))


@lru_cache(_KEPT)
def _part_of(token: str) -> bytes | None:
    """Return the bytes of a token that holds a part of a character, else None.

    A letter that a SentencePiece vocabulary holds looks like a byte, too: what follows it tells.
    """
    data = _bytes_of(token)
    try:
        if data is not None:
            data.decode()
    except UnicodeDecodeError:
        return data
    return None


def printable(text: str) -> str:
    """Return a text on one line, as people read it; what is searched for is compared in this form.

    A line break is ↵, a tab →, all other white space a space. Characters that are not seen but
    change what is around them, such as those that turn the direction of a text, are written out;
    the joiners U+200C and U+200D stay, for they are parts of words.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else _shown(char) for char in text)


def is_part(token: str) -> bool:
    """Tell whether a token may hold a part of a character."""
    return _part_of(token) is not None


def quoted(word: str) -> str:
    """Return a readable word in quotes; what is written out with a backslash stays as it is."""
    return repr(word).replace("\\\\", "\\")


def _shown(char: str) -> str:
    if char in JOINERS:
        return char
    if sign := _SIGNS.get(char):
        return sign
    return " " if unicodedata.category(char) == "Zs" else repr(char)[1:-1]


def readable_all(tokens: Sequence[str], part: slice = slice(None)) -> list[str]:
    """Return the tokens of a text, or of a part of it, as people read them. See `shown_in`."""
    return [one.shown for one in shown_in(tokens, part)]


class Numbered(NamedTuple):
    """A token among those that share its characters.

    Attributes
    ----------
    text : str
        Readable: its own, or the whole text that several tokens share.
    number : int
        Which of these tokens it is, from 1 on.
    shown : str
        Of the first the text; of the others their number, such as ₂.
    """

    text: str
    number: int
    shown: str

    @classmethod
    def of(cls, text: str, number: int = 1) -> Numbered:
        """Return it with what is shown of it."""
        return cls(text, number, text if number == 1 else str(number).translate(_SUBSCRIPTS))


def shown_in(tokens: Sequence[str], part: slice = slice(None)) -> list[Numbered]:
    """Return the tokens of a text, or of a part of it, as `numbered` has them.

    A tokenizer that does not mark white space leaves words without a seam: they get a space.

    Parameters
    ----------
    tokens : sequence of str
        Of the whole text, which tells whether white space is marked.
    part : slice
        Those that are returned.
    """
    start, stop, _ = part.indices(len(tokens))
    # The part may begin or end within a character.
    before = max(0, start - _MOST_PARTS + 1)
    found = numbered(tokens[before : stop + _MOST_PARTS - 1])[start - before : stop - before]
    # Nearly always one of the first tells.
    if any(" " in one.text for one in found) or any(" " in readable(token) for token in tokens):
        return found
    return [one._replace(shown=f"{one.shown} ") for one in found]


def numbered(tokens: Sequence[str]) -> list[Numbered]:
    """Return the tokens of a text, those that share a character joined by their bytes."""
    found = [Numbered.of(readable(token)) for token in tokens]
    parts = [_part_of(token) for token in tokens]
    done = 0
    for first, own in enumerate(parts):
        if own is None or first < done:
            continue
        data = own
        for last in range(first + 1, min(len(parts), first + _MOST_PARTS)):
            more = parts[last]
            if more is None:
                break
            data += more
            try:
                text = printable(data.decode())
            except UnicodeDecodeError:
                continue
            done = last + 1
            found[first:done] = [Numbered.of(text, at + 1) for at in range(done - first)]
            break
        if first >= done:
            found[first] = Numbered.of(alone(tokens[first]))
    return found


def alone(token: str) -> str:
    """Return a token as people read it without those around it.

    Of one that surely holds a part of a character, because its space is written as byte-level
    tokenizers write it, the part's bytes are written out. Others may be letters.
    """
    return spelled(token) if _BYTE_LEVEL_SPACE in token else readable(token)


def spelled(token: str) -> str:
    """Return a token as people read it, with bytes that are no character written out."""
    data = _part_of(token)
    return readable(token) if data is None else printable(data.decode(errors="backslashreplace"))


# What tokenizers put around a prompt, and single bytes: "<s>", "<|begin_of_text|>", "<0x0A>".
_SPECIAL = re.compile(r"<[^<>\s]{1,40}>|\[[A-Z]{2,10}\]")


def is_special(token: str) -> bool:
    """Tell whether a token looks like one that stands for no text."""
    return _SPECIAL.fullmatch(token) is not None


def label(token: str) -> str:
    """Return a token as a name in a table. See `name_of`."""
    return name_of(readable(token))


def name_of(word: str) -> str:
    """Return a word as a name in a table: what can not be seen alone is made visible."""
    if word.strip(f" {JOINERS}"):
        return word
    return "".join("␣" if char == " " else repr(char)[1:-1] for char in word)


def colour(value: float) -> tuple[int, int, int]:
    """Return the colour of a value from -1 (blue) over 0 (white) to 1 (red)."""
    if not np.isfinite(value):
        return (128, 128, 128)
    end = POSITIVE if value > 0 else NEGATIVE
    share = min(1.0, abs(value))
    red, green, blue = (round(z + (e - z) * share) for z, e in zip(ZERO, end, strict=True))
    return red, green, blue


def css(shade: tuple[int, int, int]) -> str:
    """Return a colour as styles write it."""
    return f"#{shade[0]:02x}{shade[1]:02x}{shade[2]:02x}"


def ink(background: tuple[int, int, int]) -> tuple[int, int, int]:
    """Return black or white, whichever is easier to read on a colour (Rec. 709 luma)."""
    red, green, blue = background
    light = 0.2126 * red + 0.7152 * green + 0.0722 * blue > 140
    return (0, 0, 0) if light else (255, 255, 255)


@dataclass(frozen=True, slots=True)
class TokenValues:
    """One value per token, and what it is.

    Attributes
    ----------
    values : ndarray of float32, shape [tokens]
        Raw relevance.
    title : str
        What the values are, for a legend.
    site : str
        Where they were read.
    """

    values: NDArray[np.float32]
    title: str
    site: str


def token_values(trace: Trace, site: str | None = None) -> TokenValues:
    """Return the values that colour the text of the tokens.

    What a reader wants to see on the text is the relevance of the input. That is the site
    "embed"; of the residual stream, the lowest layer, which is nearest to it (later layers have
    moved it to the last token); of the sites that add to the stream, the sum over layers.

    Parameters
    ----------
    trace : Trace
        With a value per token.
    site : str, optional
        Default: "embed" if the trace has it, else as in `Trace.relevance`.

    Raises
    ------
    InvalidArgument
        If the trace has no value per token.
    """
    if site is None:
        if not trace.sites:
            raise invalid("site", "is not there: no site was requested")
        site = next((name for name in ("embed", "resid") if name in trace.sites), trace.sites[0])
    values = trace.by_token(site).astype(np.float32)
    if site in SITES_WITHOUT_LAYERS:
        return TokenValues(values, f"site {site}", site)
    if site in STREAM_SITES:
        numbers = layer_numbers(trace, len(values))
        first = min(numbers)
        return TokenValues(values[numbers.index(first)], f"site {site}, layer {first}", site)
    return TokenValues(values.sum(axis=0), f"site {site}, sum over layers", site)


def layer_numbers(trace: Trace, count: int) -> tuple[int, ...]:
    """Return the numbers of the `count` layers of a site: counted from 0 if nobody said."""
    return trace.layers or tuple(range(count))


def scaled(values: Array) -> NDArray[np.float32]:
    """Return values divided by their largest finite absolute value; zeros stay zeros."""
    finite = np.abs(values[np.isfinite(values)])
    largest = np.float32(finite.max()) if finite.size and finite.max() > 0 else np.float32(1)
    return np.divide(values, largest, dtype=np.float32)
