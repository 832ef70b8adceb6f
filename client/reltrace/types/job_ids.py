"""Ids of submissions ("1f2e") and of their jobs ("1f2e-0")."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from reltrace.types.errors import invalid

# Ids in one request.
_PER_REQUEST = 1000

_ID = re.compile(r"[^\s-]+(-\d+)?")


def check_job_ids(ids: Sequence[str]) -> None:
    """Raise InvalidArgument if one of them is no id of a job."""
    for index, one in enumerate(ids):
        if not _is_id(one) or "-" not in one:
            raise invalid(f"ids[{index}]", f"must be a job id, not {one!r}")


def split_ids(ids: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the ids of submissions among some, and those of jobs."""
    for index, one in enumerate(ids):
        if not _is_id(one):
            raise invalid(f"ids[{index}]", f"must be a job's or submission's id, not {one!r}")
    return [one for one in ids if "-" not in one], [one for one in ids if "-" in one]


def portions(ids: Sequence[str]) -> Iterator[Sequence[str]]:
    """Return ids in portions of what one request may hold."""
    for start in range(0, len(ids), _PER_REQUEST):
        yield ids[start : start + _PER_REQUEST]


def _is_id(one: object) -> bool:
    return isinstance(one, str) and _ID.fullmatch(one) is not None
