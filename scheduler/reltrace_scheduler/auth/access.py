"""What guards the gRPC port, and what may be left unguarded."""

from dataclasses import dataclass

from reltrace_proto.net import is_loopback

from reltrace_scheduler.auth.rates import UNLIMITED, Rates
from reltrace_scheduler.auth.tls import ServerTls
from reltrace_scheduler.auth.tokens import Tokens
from reltrace_scheduler.errors import StartError


@dataclass(frozen=True, slots=True)
class Access:
    """Who may call."""

    tokens: Tokens | None = None
    """None: every caller may do everything."""
    tls: ServerTls | None = None
    """None: plaintext."""
    rates: Rates = UNLIMITED
    insecure: bool = False
    """Serve without TLS or tokens on other addresses than this machine's own."""

    def check(self, listen: str, option: str = "--listen") -> None:
        """Raise StartError if other machines could reach an address without TLS or tokens."""
        needed = {"--tls-cert and --tls-key": self.tls, "--tokens": self.tokens}
        missing = [name for name, value in needed.items() if value is None]
        if missing and not self.insecure and not is_loopback(listen):
            raise StartError(
                f"{option} {listen}: other machines can reach this address; add "
                f"{' and '.join(missing)}, listen on 127.0.0.1, or say --insecure if no "
                "stranger can reach this network"
            )
