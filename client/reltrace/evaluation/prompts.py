"""The prompts of an evaluation, and the answers that are known of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from reltrace.types.checks import check_id, check_text, whole_number
from reltrace.types.errors import invalid
from reltrace.types.target import Target, is_several
from reltrace.types.trace import Trace

_INPUTS = ("prompt", "input_ids", "messages", "add_special_tokens")
_ALLOWED = ("id", *_INPUTS, "target", "answer")


@dataclass(frozen=True, slots=True)
class Prompt:
    number: int  # from 0
    id: str | int  # that of the mapping, else `number`
    item: Mapping[str, Any]  # arguments of `trace`: the input, and perhaps a target
    answer: str | tuple[int, ...] | None  # what the prediction rests on: a text, or positions

    @classmethod
    def of(cls, number: int, value: object) -> Prompt:
        """Check a prompt as the caller gave it; raise InvalidArgument if it is wrong."""
        if isinstance(value, str):
            return cls(number, number, {"prompt": value}, None)
        field = f"prompts[{number}]"
        if not isinstance(value, Mapping):
            raise invalid(field, f"must be text or a mapping, not {type(value).__name__}")
        unknown = [key for key in value if key not in _ALLOWED]
        if unknown:
            raise invalid(field, f"has {unknown[0]!r}; allowed: {', '.join(_ALLOWED)}")
        name = check_id(value.get("id", number), f"{field}.id")
        item = {key: value[key] for key in _INPUTS if key in value}
        if "target" in value:
            item["target"] = single_target(value["target"], f"{field}.target")
        answer = value.get("answer")
        if answer is not None and not isinstance(answer, str):
            answer = _positions(answer, f"{field}.answer")
        return cls(number, name, item, answer)

    def answer_positions(self, trace: Trace, count: int) -> list[int]:
        """Return the positions of the answer's tokens among the first `count` tokens.

        A text must be made of whole tokens, but for white space. Raises InvalidArgument if the
        prompt has no such tokens.
        """
        if not self.answer:
            raise invalid("answer", "is empty; give a text or positions, or leave it out")
        if isinstance(self.answer, tuple):
            if max(self.answer) >= count:
                raise invalid("answer", f"names positions outside of the {count} tokens")
            return list(self.answer)
        wanted = self.answer.strip()
        text, spans = trace.text, trace.offsets.tolist()
        begin = text.find(wanted) if wanted else -1
        while begin >= 0:
            end = begin + len(wanted)
            where = [
                position
                for position, (first, stop) in enumerate(spans[:count])
                if first < end and stop > begin
            ]
            if where and text[spans[where[0]][0] : spans[where[-1]][1]].strip() == wanted:
                return where
            begin = text.find(wanted, begin + 1)
        raise invalid("answer", f"{self.answer!r} is not made of whole tokens of the prompt")


def single_target(target: Any, field: str) -> Any:
    """Return a target, as a continuation if it is a text: it may be of several tokens.

    Raises InvalidArgument if it can not be measured as one value.
    """
    if is_several(target):
        raise invalid(field, "must be one, not several")
    if isinstance(target, str):
        check_text(target, field)
    found = Target(target) if isinstance(target, str) else target
    if (
        isinstance(found, Target)
        and isinstance(found.token, str)
        and found.token != "max"
        and (found.position, found.contrast) == (-1, None)
    ):
        return Target(continuation=found.token, logprob=found.logprob)
    return target


def _positions(value: object, field: str) -> tuple[int, ...]:
    """Return positions in rising order, each once."""
    listed = value.tolist() if isinstance(value, np.ndarray) else value
    if isinstance(listed, bytes) or not isinstance(listed, Sequence):
        raise invalid(
            field, f"must be a text or positions of tokens from 0, not {type(value).__name__}"
        )
    found = {whole_number(one, f"{field}[{index}]") for index, one in enumerate(listed)}
    return tuple(sorted(found))
