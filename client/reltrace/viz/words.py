"""The tokens of a trace as people read them: in its text, and as names in a table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from reltrace.types.token_text import (
    TokenText,
    escaped_bytes,
    is_special,
    printable,
    quoted,
    readable,
    readable_alone,
    token_texts,
    visible,
)
from reltrace.types.tokens import Tokens, Turn
from reltrace.types.top_entries import Entry
from reltrace.types.trace import Trace

# Stands in a decoded text for bytes that are not a character.
_NO_CHARACTER = "\ufffd"


@dataclass(frozen=True, slots=True)
class Words:
    """The tokens of a trace, or of `Client.tokenize`.

    Of tokens that share a character the first has it whole, and the others a number: ₂, ₃, ...
    """

    texts: list[str]
    """As they follow each other in the text."""
    names: list[str]
    """For tables: white space is visible, and a number stands after its character."""
    special: list[bool]

    @classmethod
    def of(cls, trace: Trace | Tokens) -> Words:
        """Return them by the text and its offsets; those of an older trace by the tokens."""
        if len(trace.offsets) == len(trace.tokens):
            found = list(_by_offsets(trace))
            positions = set(trace.special_positions)
            special = [position in positions for position in range(len(found))]
        else:
            found = token_texts(trace.tokens)
            special = [is_special(token) for token in trace.tokens]
        names = [visible(one.text) + one.shown * (one.number > 1) for one in found]
        return cls([one.shown for one in found], names, special)


def _by_offsets(trace: Trace | Tokens) -> Iterator[TokenText]:
    """Yield the text of each token, with white space before it that no token covers."""
    done, before, one = 0, (0, 0), TokenText.of("")
    for token, (start, stop) in zip(trace.tokens, trace.offsets.tolist(), strict=True):
        text = trace.text[min(done, start) : stop]
        if before == (start, stop) and start < stop:
            one = TokenText.of(one.text, one.number + 1)
        elif _NO_CHARACTER in text:
            one = TokenText.of(escaped_bytes(token))
        elif start == stop:
            one = TokenText.of(readable(token))
        else:
            one = TokenText.of(printable(text))
        done, before = max(done, stop), (start, stop)
        yield one


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens `first` to ``stop - 1``: a turn of a conversation; with role "": between turns."""

    first: int
    stop: int
    role: str


def segments(trace: Trace) -> list[Segment]:
    """Return the turns of a trace and what is between them; one segment for a plain text."""
    found: list[Segment] = []
    done = 0
    for turn in [*trace.turns, Turn("", len(trace.tokens), len(trace.tokens))]:
        if turn.first > done:
            found.append(Segment(done, turn.first, ""))
        if turn.stop > turn.first:
            found.append(Segment(turn.first, turn.stop, turn.role))
        done = max(done, turn.stop)
    return found


def next_tokens(trace: Trace, count: int = 5) -> str:
    """Return the likeliest tokens at the target's position; "" if they are not known."""
    return ", ".join(
        f"{quoted(readable_alone(one.token))} {one.probability:.1%}"
        for one in trace.target.candidates[:count]
    )


def entry_table(
    entries: Sequence[Entry], names: Sequence[str]
) -> tuple[list[str], list[list[str]]]:
    """Return titles and rows of single values; `names` are those of the tokens."""
    fields = [
        name
        for name in ("layer", "position", "token", "feature")
        if entries and getattr(entries[0], name) is not None
    ]
    rows = []
    for entry in entries:
        row = {name: str(getattr(entry, name)) for name in fields}
        if entry.position is not None:
            row["token"] = names[entry.position]
        rows.append([*row.values(), f"{entry.value:+.4g}"])
    return [*fields, "R"], rows


def describe_target(trace: Trace) -> str:
    """Return the target and its value in words."""
    target = trace.target
    kind = "log-probability" if target.logprob else "logit"
    name = quoted(readable_alone(target.token))
    if target.contrast is not None:
        name += f" minus {quoted(readable_alone(target.contrast))}"
    if len(target.continuation_ids) > 1:
        name = f"{len(target.continuation_ids)} response tokens"
    return f"{name} ({kind} {target.logit:.3f})"
