"""What the worker says of itself, on standard error."""

import logging
import sys
from enum import StrEnum
from typing import Any

import structlog


class LogFormat(StrEnum):
    """For people, or one JSON object a line."""

    CONSOLE = "console"
    JSON = "json"


def configure(level: int, form: LogFormat, worker: str) -> None:
    """Set up structlog for the whole process; every line names the worker.

    Parameters
    ----------
    level : int
        As the module `logging` numbers them.
    worker : str
        Its id.
    """

    def name(
        logger: Any, method: str, event: structlog.types.EventDict
    ) -> structlog.types.EventDict:
        # Not a context variable: passes and encoding run on threads of their own.
        event.setdefault("worker", worker)
        return event

    renderer: list[structlog.types.Processor] = (
        [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
        if form is LogFormat.JSON
        else [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())]
    )
    structlog.configure(
        processors=[
            name,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            *renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )


def level_of(name: str) -> int | None:
    """Return the number of a level's name; None: there is none."""
    return logging.getLevelNamesMapping().get(name.upper())
