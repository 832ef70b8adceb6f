"""The caller of the RPC under way."""

from contextvars import ContextVar
from dataclasses import dataclass
from enum import StrEnum

DEFAULT_TENANT = "default"
"""The tenant of every caller where no tokens are set."""

TENANT_NAME = r"(?!\.{1,2}\Z)[A-Za-z0-9_.-]{1,64}"
"""A regular expression; no colon, which separates the parts of a key in Redis, and no name of
another folder: a tenant's name may be one of a folder.
"""

TENANT_RULE = "must be 1 to 64 letters, digits, or any of _.-, and not . or .."
"""`TENANT_NAME` in words, for messages."""


class Role(StrEnum):
    CLIENT = "client"
    """Submit jobs, and read and cancel those of its tenant."""
    WORKER = "worker"
    """Lease jobs of every tenant and store their results."""
    OPERATOR = "operator"
    """What a client may; see all tenants, and act on workers, tenants and quarantined jobs."""

    def includes(self, other: "Role") -> bool:
        return other is self or (self is Role.OPERATOR and other is Role.CLIENT)


@dataclass(frozen=True, slots=True)
class Identity:
    name: str
    """Of its token; the log shows it."""
    tenant: str
    """Whose jobs it may submit, read and cancel."""
    role: Role


LOCAL = Identity("local", DEFAULT_TENANT, Role.OPERATOR)
"""Every caller, where no tokens are set."""

_current: ContextVar[Identity] = ContextVar("identity", default=LOCAL)


def current() -> Identity:
    return _current.get()


def act_as(identity: Identity) -> None:
    """Set the caller for the rest of this task: gRPC runs each RPC in a task of its own."""
    _current.set(identity)
