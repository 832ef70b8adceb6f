"""Every error that the worker raises on purpose, and the violations that a job's error carries."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


class WorkerError(Exception):
    """Base of every error that the worker raises on purpose."""


@dataclass(frozen=True, slots=True)
class Violation:
    """One fault of a job, as in ``google.rpc.BadRequest``."""

    # Path inside the job: "prompt", "input_ids[3]", "targets[0].token".
    field: str
    # What is wrong and what is allowed.
    description: str


class InvalidJob(WorkerError):  # noqa: N818 - it is the job that is at fault, not the program
    """A job that this model can not run; carries every violation that was found, at least one."""

    def __init__(self, violations: Iterable[Violation]) -> None:
        self.violations: tuple[Violation, ...] = tuple(violations)
        if not self.violations:
            raise ValueError("InvalidJob needs at least one violation")
        super().__init__("; ".join(f"{v.field}: {v.description}" for v in self.violations))


class Faults:
    """Collects the violations of one job, so that a client sees all of them at once."""

    def __init__(self) -> None:
        self.found: list[Violation] = []

    def add(self, field: str, description: str) -> None:
        self.found.append(Violation(field, description))

    def require(self, fulfilled: bool, field: str, description: str) -> None:
        if not fulfilled:
            self.add(field, description)

    def raise_any(self) -> None:
        if self.found:
            raise InvalidJob(self.found)


class ModelError(WorkerError):
    """A model could not be loaded, or the rules do not reach all of it."""


class EngineError(WorkerError):
    """A job can not be computed: its numbers are not finite, or it does not fit into memory."""


class NotFiniteError(EngineError):
    """Numbers of a job are not finite, by its own fault or by a neighbour's in its pass."""


class PassFailedError(EngineError):
    """A pass failed for a reason that may pass: another attempt is worthwhile."""


class ResultTooLargeError(WorkerError):
    """The result of a job would be larger than what may be sent, and nothing is computed."""


class DeviceLostError(WorkerError):
    """The device no longer works for this process; only a new process may help."""
