"""What the scheduler says of itself, on standard error."""

import logging
import sys
from enum import StrEnum

import structlog


class LogFormat(StrEnum):
    """For people, or one JSON object a line."""

    CONSOLE = "console"
    JSON = "json"


def configure(level: int, form: LogFormat) -> None:
    """Set up structlog for the whole process.

    Parameters
    ----------
    level : int
        As the module `logging` numbers them.
    """
    renderer: list[structlog.types.Processor] = (
        [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
        if form is LogFormat.JSON
        else [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())]
    )
    structlog.configure(
        processors=[
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
