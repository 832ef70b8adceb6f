"""Items of `trace_many` that failed."""

from __future__ import annotations

from dataclasses import dataclass, field
from html import escape

from reltrace.types.errors import TraceError, with_item


@dataclass(frozen=True, slots=True)
class Failure:
    """An item of `trace_many` that failed.

    Attributes
    ----------
    id : str or int
        The item's id: the given one, else its index.
    reason : TraceError
        Why it failed.
    error : TraceError
        `reason` with the item's id in front of its message, to be raised.
    """

    id: str | int
    reason: TraceError
    error: TraceError = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "error", with_item(self.reason, self.id))

    @property
    def job_id(self) -> str | None:
        """Id of the job that failed, as in the server's logs; None if there was none."""
        return self.error.job_id

    def __str__(self) -> str:
        return f"{type(self.error).__name__}: {self.error}"

    def _repr_html_(self) -> str:
        """Return what a notebook shows: the kind of error and its message, which names the item."""
        kind, message = type(self.error).__name__, escape(str(self.error))
        return f"<div><strong>{kind}</strong>: <code>{message}</code></div>"
