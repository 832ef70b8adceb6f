"""Checks of arguments. Errors name the argument, what is allowed and what was passed."""

from __future__ import annotations

import operator
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from numbers import Real
from typing import Any, TypeGuard

from reltrace.types.errors import invalid

_ID = re.compile(r"[^\s-]+(-\d+)?")
_IDS_PER_REQUEST = 1000


def whole_number(value: object, argument: str, least: int = 0, most: int | None = None) -> int:
    """Return a whole number of Python's or NumPy's, `least` to `most` included, as an int."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None or number < least or (most is not None and number > most):
        allowed = f"from {least} on" if most is None else f"from {least} to {most}"
        given = repr(value) if number is None else number
        raise invalid(argument, f"must be a whole number {allowed}, not {given}")
    return number


def number(value: object, argument: str, least: float, most: float) -> float:
    """Return a finite number of Python's or NumPy's, `least` to `most` included, as a float."""
    real = isinstance(value, Real) and not isinstance(value, bool)
    if not real or not least <= value <= most:  # type: ignore[operator]
        raise invalid(argument, f"must be a number from {least:g} to {most:g}, not {value!r}")
    return float(value)  # type: ignore[arg-type]


def check_name(value: object, argument: str, allowed: Collection[str]) -> None:
    """Raise InvalidArgument if a value is not one of the allowed names."""
    if not isinstance(value, str) or value not in allowed:
        raise invalid(argument, f"must be one of {', '.join(allowed)}, not {value!r}")


def one_of(value: Any, argument: str, allowed: Mapping[str, Any]) -> Any:
    """Return the value of a name in a mapping of the allowed names."""
    check_name(value, argument, allowed)
    return allowed[value]


def flag(value: object, argument: str) -> bool:
    """Return a bool unchanged."""
    if not isinstance(value, bool):
        raise invalid(argument, f"must be True or False, not {value!r}")
    return value


def check_text(text: str, argument: str) -> None:
    """Raise InvalidArgument if a text is empty or can not be encoded as UTF-8."""
    if not text:
        raise invalid(argument, "must not be empty")
    check_encodable(text, argument)


def check_encodable(text: str, argument: str) -> None:
    """Raise InvalidArgument if a text can not be encoded as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise invalid(
            argument,
            f"character {error.start} is a lone surrogate ({text[error.start]!r}), which no "
            "UTF-8 text holds",
        ) from None


def check_strings(values: Sequence[object], argument: str) -> None:
    """Raise InvalidArgument if one of the values is not a str."""
    for index, value in enumerate(values):
        if not isinstance(value, str):
            raise invalid(f"{argument}[{index}]", f"must be str, not {type(value).__name__}")


def is_id(value: object) -> TypeGuard[str | int]:
    """Tell whether a value may be the id of an item."""
    return isinstance(value, str | int) and not isinstance(value, bool)


def check_id(value: object, argument: str) -> str | int:
    """Return the id of an item: a whole number, or a text that can be encoded as UTF-8."""
    if not isinstance(value, str | bool):
        # Of numpy's whole numbers, too.
        with suppress(TypeError):
            value = operator.index(value)  # type: ignore[arg-type]
    if not is_id(value):
        raise invalid(argument, f"must be text or a whole number, not {value!r}")
    if isinstance(value, str):
        check_encodable(value, argument)
    return value


def check_same_settings(before: Mapping[str, Any], asked: Mapping[str, Any], holder: str) -> None:
    """Raise InvalidArgument for settings that differ from those of the folder `out`."""
    # Older versions always added special tokens and did not save the setting.
    before = {"add_special_tokens": True, **before}
    changed = [
        f"{name} was {before.get(name)!r} and is {value!r}"
        for name, value in asked.items()
        if before.get(name) != value
    ]
    if changed:
        raise invalid(
            "out",
            f"{holder} with other settings ({'; '.join(changed)}); use the same, or another folder",
        )


def check_job_ids(ids: Sequence[str]) -> None:
    """Raise InvalidArgument if one of them is not the id of a job, such as "1f2e-0"."""
    for index, one in enumerate(ids):
        if not _is_job_or_submission(one) or "-" not in one:
            raise invalid(f"ids[{index}]", f"must be a job id, not {one!r}")


def split_ids(ids: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the ids of submissions, such as "1f2e", and those of jobs."""
    for index, one in enumerate(ids):
        if not _is_job_or_submission(one):
            raise invalid(f"ids[{index}]", f"must be a job's or submission's id, not {one!r}")
    return [one for one in ids if "-" not in one], [one for one in ids if "-" in one]


def portions(ids: Sequence[str]) -> Iterator[Sequence[str]]:
    """Return ids in portions of what one request may hold."""
    for start in range(0, len(ids), _IDS_PER_REQUEST):
        yield ids[start : start + _IDS_PER_REQUEST]


def _is_job_or_submission(one: object) -> bool:
    return isinstance(one, str) and _ID.fullmatch(one) is not None
