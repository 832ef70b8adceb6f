"""Checks of what a caller gives: each names the argument, what is allowed and what was given."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, TypeGuard

from reltrace.types.errors import invalid


def whole_number(value: object, argument: str, least: int = 0, most: int | None = None) -> int:
    """Return a whole number, of Python's or of NumPy's, as an int.

    Parameters
    ----------
    value : object
        As given.
    argument : str
        Its name.
    least, most : int
        What is allowed, both included; None: no bound.

    Raises
    ------
    InvalidArgument
        It is something else, or out of bounds.
    """
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
    """Return a finite number, of Python's or of NumPy's, as a float.

    Parameters
    ----------
    value : object
        As given.
    argument : str
        Its name.
    least, most : float
        What is allowed, both included.

    Raises
    ------
    InvalidArgument
        It is something else, or out of bounds.
    """
    real = isinstance(value, Real) and not isinstance(value, bool)
    if not real or not least <= value <= most:  # type: ignore[operator]
        raise invalid(argument, f"must be a number from {least:g} to {most:g}, not {value!r}")
    return float(value)  # type: ignore[arg-type]


def check_text(text: str, argument: str) -> None:
    """Raise InvalidArgument if `text` is empty or can not be encoded as UTF-8."""
    if not text:
        raise invalid(argument, "must not be empty")
    check_encodable(text, argument)


def check_encodable(text: str, argument: str) -> None:
    """Raise InvalidArgument if `text` can not be encoded as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise invalid(
            argument,
            f"character {error.start} is a lone surrogate ({text[error.start]!r}), which no "
            "UTF-8 text holds",
        ) from None


def check_texts(values: Sequence[object], argument: str) -> None:
    """Raise InvalidArgument if one of the values is not a str."""
    for index, value in enumerate(values):
        if not isinstance(value, str):
            raise invalid(f"{argument}[{index}]", f"must be str, not {type(value).__name__}")


def is_id(name: object) -> TypeGuard[str | int]:
    """Tell whether an item may be called this."""
    return isinstance(name, str | int) and not isinstance(name, bool)


def check_id(name: object, argument: str) -> str | int:
    """Return the name of an item; raise InvalidArgument if it is neither a text nor a number.

    A text that can not be encoded as UTF-8 is none: no file could hold it.
    """
    if not is_id(name):
        raise invalid(argument, f"must be text or a whole number, not {name!r}")
    if isinstance(name, str):
        check_encodable(name, argument)
    return name


def check_same_settings(before: Mapping[str, Any], asked: Mapping[str, Any], holder: str) -> None:
    """Raise InvalidArgument if `out` holds what was made with other settings; name these."""
    # What an older version did not note, as there was no choice of it.
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
