"""Text as the model reads it: its tokens, and the characters that each of them holds.

Prompts of traces, of generations and of atlases are all encoded here:

- What the tokenizer puts in front of a text (BOS) is added once, and not where the text has it
  already; what it would put behind a text (EOS) is not added, for a prompt goes on.
- A prompt and the continuation behind it are encoded together. The continuation begins with the
  first token that holds a character of it, also where that token holds the end of the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from reltrace_worker.models.vocabulary import REPLACEMENT, Vocabulary
from reltrace_worker.types.jobs import Span

# Tokens after which a character that is still not whole is taken for a broken one.
_MAX_PARTIAL_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Encoded:
    """A text and its tokens; `offsets` has the characters (code points) of each token."""

    # As the model reads it, special tokens included.
    text: str
    token_ids: tuple[int, ...]
    offsets: tuple[Span, ...]

    def up_to(self, tokens: int) -> Encoded:
        """Return the first tokens, and the text as far as they go."""
        if tokens == len(self.token_ids):
            return self
        offsets = self.offsets[:tokens]
        text = self.text[: max((stop for _, stop in offsets), default=0)]
        return Encoded(text, self.token_ids[:tokens], offsets)

    def tokens_of(self, first: int, stop: int) -> Span:
        """Return the tokens that hold some of the characters `first` to ``stop - 1``."""
        begin = self.first_token(first)
        end = next((i for i, (at, _) in enumerate(self.offsets) if at >= stop and i >= begin), None)
        return begin, max(begin, len(self.offsets) if end is None else end)

    def first_token(self, character: int) -> int:
        """Return the first token that ends behind the beginning of a character."""
        ends = (i for i, (_, stop) in enumerate(self.offsets) if stop > character)
        return next(ends, len(self.offsets))


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt of `length` tokens and its continuation, encoded together.

    `hints` tell the client what is unexpected about the border between them.
    """

    encoded: Encoded
    length: int
    hints: tuple[str, ...] = ()

    @property
    def continuation(self) -> tuple[int, ...]:
        return self.encoded.token_ids[self.length :]


class TextEncoder:
    """Encodes and decodes text with offsets, by a tokenizer of the ``tokenizers`` library."""

    def __init__(self, tokenizer: Any) -> None:
        self._backend = backend = tokenizer.backend_tokenizer
        self.vocabulary = Vocabulary(tokenizer)
        # A file may ask for them, for training.
        backend.no_truncation()
        backend.no_padding()
        _keep_spaces_in_offsets(backend.post_processor)
        # The tokens in front of a text are what the post-processor puts there.
        probe = backend.encode("a", add_special_tokens=True)
        is_special = probe.special_tokens_mask
        self._prefix = tuple(probe.ids[: is_special.index(0) if 0 in is_special else 0])

    def encode(self, text: str, *, special: bool) -> Encoded:
        """Encode a text, with the tokens that belong in front of it if `special`."""
        encoding = self._backend.encode(text, add_special_tokens=False)
        ids = tuple(encoding.ids)
        offsets = _whole_characters(encoding.offsets)
        first = text[slice(*offsets[0])] if offsets else ""
        # SentencePiece reads "▁" as a space; the one that it puts before a text is no character.
        if first.replace("▁", " ").strip() and not self.vocabulary.text(ids[0]).strip():
            offsets[0] = (offsets[0][0],) * 2
        before = Encoded("", (), ())
        for token in self._missing_prefix(ids) if special else ():
            name = self.vocabulary.text(token)
            before = _concatenated(before, Encoded(name, (token,), ((0, len(name)),)))
        return _concatenated(before, Encoded(text, ids, tuple(offsets)))

    def decode(self, ids: Sequence[int], behind: Sequence[int] = ()) -> Encoded:
        """Return the text of ids, as it stands behind other tokens.

        Tokens are decoded one by one, each behind those before it, until characters are whole.
        """
        whole = [*behind[-_MAX_PARTIAL_TOKENS:], *ids]
        start = len(whole) - len(ids)
        text, offsets = "", []
        context, read = 0, start
        for index in range(start, len(whole)):
            known = self._decode(whole[context:read])
            grown = self._decode(whole[context : index + 1])
            is_partial = grown.endswith(REPLACEMENT) and index < len(whole) - 1
            if is_partial and index - read < _MAX_PARTIAL_TOKENS:
                continue
            span = len(text), len(text) + len(grown) - len(known)
            offsets += [span] * (index + 1 - read)
            text += grown[len(known) :]
            if len(grown) > len(known):
                context = read
            read = index + 1
        return Encoded(text, tuple(ids), tuple(offsets))

    def joined(self, prompt: str, continuation: str, *, special: bool) -> Prompt:
        """Encode a prompt and the text behind it together."""
        encoded = self.encode(prompt + continuation, special=special)
        border = len(encoded.text) - len(continuation)
        length = encoded.first_token(border)
        hints: tuple[str, ...] = ()
        if length < len(encoded.offsets) and (first := encoded.offsets[length][0]) < border:
            token = self.vocabulary.text(encoded.token_ids[length])
            hints = (
                f"The token {token!r} holds {encoded.text[first:border]!r} of the prompt and the "
                "beginning of the continuation; it counts as part of the continuation.",
            )
        return Prompt(encoded, length, hints)

    def appended(self, prompt: Encoded, continuation: str | tuple[int, ...]) -> Prompt:
        """Put a continuation behind tokens that stay as they are."""
        length = len(prompt.token_ids)
        hints: tuple[str, ...] = ()
        if isinstance(continuation, str):
            ids = self.encode(prompt.text + continuation, special=False).token_ids
            if ids[:length] == prompt.token_ids:
                ids = ids[length:]
            else:
                ids = self.encode(continuation, special=False).token_ids
                hints = (
                    "The tokenizer encodes the text of the input_ids and the continuation in "
                    "another way; the continuation was encoded alone.",
                )
        else:
            ids = continuation
        encoded = _concatenated(prompt, self.decode(ids, prompt.token_ids))
        return Prompt(encoded, length, hints)

    def _missing_prefix(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        """Return what belongs in front of a text and is not there."""
        prefix = self._prefix
        if ids[:1] == prefix[:1]:
            return ()
        return next(
            prefix[:kept]
            for kept in range(len(prefix) + 1)
            if ids[: len(prefix) - kept] == prefix[kept:]
        )

    def _decode(self, ids: list[int]) -> str:
        decoded: str = self._backend.decode(ids, skip_special_tokens=False)
        return decoded


def _concatenated(left: Encoded, right: Encoded) -> Encoded:
    shift = len(left.text)
    offsets = tuple((first + shift, stop + shift) for first, stop in right.offsets)
    return Encoded(left.text + right.text, left.token_ids + right.token_ids, left.offsets + offsets)


def _keep_spaces_in_offsets(processor: Any) -> None:
    """Let tokens keep the space that begins them, wherever a post-processor leaves it out."""
    # A sequence of the tokenizers library has no length, and ends by an IndexError.
    for part in processor if hasattr(processor, "__getitem__") else [processor]:
        if getattr(part, "trim_offsets", False):
            part.trim_offsets = False


def _whole_characters(offsets: Sequence[Span]) -> list[Span]:
    """Give tokens that share a character the same span."""
    spans: list[Span] = []
    begin = 0
    for span in offsets:
        if spans and span[0] < spans[-1][1] and span[0] < span[1]:
            joined = spans[-1][0], max(spans[-1][1], span[1])
            spans[begin:] = [joined] * (len(spans) - begin)
            span = joined
        else:
            begin = len(spans)
        spans.append(span)
    return spans
