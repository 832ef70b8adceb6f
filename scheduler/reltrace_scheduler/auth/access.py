"""How the gRPC port and the page are protected: tokens, TLS and rates."""

from dataclasses import dataclass, field

from reltrace_proto.net import host_and_port, is_loopback

from reltrace_scheduler.auth.rates import Rates
from reltrace_scheduler.auth.tls import ServerTls
from reltrace_scheduler.auth.tokens import Tokens
from reltrace_scheduler.errors import StartError


@dataclass(frozen=True, slots=True)
class Access:
    tokens: Tokens | None = None
    """None: every caller may do everything."""
    tls: ServerTls | None = None
    """None: plaintext."""
    rates: Rates = field(default_factory=Rates)
    insecure: bool = False
    """Whether other machines may be served without TLS or without tokens."""
    insecure_metrics: bool = False
    """Whether they may read the metrics, which have neither."""

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

    def check_metrics(self, listen: str) -> None:
        """Raise StartError if other machines could read the metrics, and nobody allowed it."""
        host_and_port("--metrics", listen)
        if not (self.insecure or self.insecure_metrics or is_loopback(listen)):
            raise StartError(
                f"--metrics {listen}: other machines can read the names of tenants and models "
                "here, without TLS or a token; listen on 127.0.0.1, or say --insecure-metrics if "
                "only your monitoring can reach this address"
            )
