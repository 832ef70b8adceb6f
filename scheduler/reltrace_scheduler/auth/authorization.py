"""Finds the caller of a method by its token, and checks its role."""

from typing import Any

import structlog

from reltrace_scheduler.auth.identity import Identity, Role
from reltrace_scheduler.auth.tokens import Tokens
from reltrace_scheduler.errors import ForbiddenError, UnauthenticatedError

log = structlog.get_logger()

_NEEDS = {
    "reltrace.v1.TraceService": Role.CLIENT,
    "reltrace.v1.WorkerService": Role.WORKER,
    "reltrace.v1.AdminService": Role.OPERATOR,
}
_LONGEST_TOKEN = 512
"""Characters; a token made here has 47."""

_HOW = "set RELTRACE_TOKEN, or RELTRACE_TOKEN_FILE to a file that holds the token"


def authorize(tokens: Tokens, method: str, metadata: Any) -> tuple[str, Identity]:
    """Return the token that a call presents and its identity, whose role allows the method."""
    try:
        token = _bearer(metadata)
        identity = tokens.find(token)
        _check_role(identity, method)
    except (UnauthenticatedError, ForbiddenError) as error:
        log.info("call.refused", method=method[:_LONGEST_TOKEN], reason=error.message)
        raise
    return token, identity


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
