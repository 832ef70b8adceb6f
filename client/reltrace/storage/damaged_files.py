"""Files whose content is not what it should be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from reltrace.types.errors import TraceError, invalid


def named_if_damaged(path: Path, what: str) -> AbstractContextManager[None]:
    """Raise InvalidArgument, "PATH is WHAT: ...", if the content of a file is damaged."""
    return invalid_if_damaged("path", f"{path} is {what}")


@contextmanager
def invalid_if_damaged(field: str, fault: str) -> Iterator[None]:
    """Raise InvalidArgument of an argument, "FAULT: ...", if the content of a file is damaged.

    Libraries raise any error for the content of a file. An OSError with a number is about the file
    itself, and is raised as it is.
    """
    try:
        yield
    except TraceError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise invalid(field, f"{fault}: {str(error) or type(error).__name__}") from error


def check_kinds(
    found: Any, kinds: Mapping[str, type | tuple[type, ...]], *, complete: bool = False
) -> None:
    """Raise TypeError if a value of JSON is no object, or a field of it is of another type.

    A bool is no int here. `complete` objects have all fields: KeyError names one that is missing.
    """
    if not isinstance(found, dict):
        raise TypeError("it is not a JSON object")
    for name, kind in kinds.items():
        allowed = kind if isinstance(kind, tuple) else (kind,)
        if name not in found:
            if complete:
                raise KeyError(name)
        elif type(found[name]) not in allowed:
            names = " or ".join(one.__name__ for one in allowed)
            raise TypeError(f"{name} must be {names}, not {type(found[name]).__name__}")
