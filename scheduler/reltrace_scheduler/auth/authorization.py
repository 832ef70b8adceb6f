"""Finds the caller of a method by its token, and checks its role."""

from typing import Any

import structlog

from reltrace_scheduler.auth.identity import Identity, Role
from reltrace_scheduler.auth.tokens import Tokens
from reltrace_scheduler.errors import ForbiddenError, UnauthenticatedError
from reltrace_scheduler.per_second import PerSecond

log = structlog.get_logger()

_NEEDS = {
    "reltrace.v1.TraceService": Role.CLIENT,
    "reltrace.v1.WorkerService": Role.WORKER,
    "reltrace.v1.AdminService": Role.OPERATOR,
}
_LONGEST_TOKEN = 512
"""Characters; a token made here has 47."""

_LONGEST_METHOD = 100
"""Characters that are shown; one of ours has up to 50. A stranger may send any name."""

_LOGGED_PER_SECOND = 10

_HOW = "set RELTRACE_TOKEN, or RELTRACE_TOKEN_FILE to a file that holds the token"


class Authorizer:
    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens
        self._lines = PerSecond(_LOGGED_PER_SECOND)
        self._unlogged = 0

    def authorize(self, method: str, metadata: Any) -> tuple[str, Identity]:
        """Return the token that a call presents and its identity, whose role allows the method."""
        method = method[:_LONGEST_METHOD]
        try:
            token = _bearer(metadata)
            identity = self._tokens.find(token)
            _check_role(identity, method)
        except (UnauthenticatedError, ForbiddenError) as error:
            self._log(method, error.message)
            raise
        return token, identity

    def _log(self, method: str, reason: str) -> None:
        """Log a refused call; where they are too many, only how many there were."""
        if not self._lines.take(1):
            self._unlogged += 1
            return
        log.info("call.refused", method=method, reason=reason, unlogged_before=self._unlogged)
        self._unlogged = 0


def _bearer(metadata: Any) -> str:
    values = [value for key, value in metadata or () if key == "authorization"]
    if not values:
        raise UnauthenticatedError(f"this server asks for a token: {_HOW}")
    scheme, _, token = str(values[0]).partition(" ")
    if len(values) > 1 or scheme.lower() != "bearer" or not token or len(token) > _LONGEST_TOKEN:
        raise UnauthenticatedError(f"the authorization is not one `Bearer TOKEN`: {_HOW}")
    return token.strip()


def _check_role(identity: Identity, method: str) -> None:
    service, _, name = method.removeprefix("/").partition("/")
    # A service that is not listed is for operators only.
    needed = _NEEDS.get(service, Role.OPERATOR)
    if not identity.role.includes(needed):
        raise ForbiddenError(
            f"{name} needs a token of the role {needed}, and {identity.name!r} has the role "
            f"{identity.role}: ask the operator for one"
        )
