"""The version of the protocol between schedulers and workers, which their greetings tell.

It is raised with a change that the other side has to know of. The newer side decides whether it can
serve the older one; what is merely added is announced on its own (``drafts``, ``capabilities``).
Clients have none: a scheduler refuses jobs with fields that it does not know.
"""

PROTOCOL = 1
"""1: workers know ``Reconnect`` and ``Deferred``."""

OLDEST_PROTOCOL = 0
"""The oldest that this side serves; 0: from before there were versions."""


def protocol_fault(other: str, theirs: int) -> str:
    """Return why another side, such as ``"this worker"``, is not served; empty: it is."""
    if theirs >= OLDEST_PROTOCOL:
        return ""
    return (
        f"{other} speaks version {theirs} of the protocol, and versions {OLDEST_PROTOCOL} to "
        f"{PROTOCOL} are served: update it"
    )
