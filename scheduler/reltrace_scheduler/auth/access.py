"""What guards the gRPC port, and what may be left unguarded."""

from dataclasses import dataclass

from reltrace_proto.net import is_loopback

from reltrace_scheduler.auth.rates import UNLIMITED, Rates
from reltrace_scheduler.auth.tls import ServerTls
from reltrace_scheduler.auth.tokens import Tokens
from reltrace_scheduler.errors import StartError


@dataclass(frozen=True, slots=True)
class Access:
    """Who gets in.

    Parameters
    ----------
    tokens : Tokens or None
        None: everybody may do everything.
    tls : ServerTls or None
        None: plaintext.
    rates : Rates
        How fast a caller may call.
    insecure : bool
        Serve without TLS or tokens on other addresses than this machine's own.
    """

    tokens: Tokens | None = None
    tls: ServerTls | None = None
    rates: Rates = UNLIMITED
    insecure: bool = False

    def check(self, listen: str, option: str = "--listen") -> None:
        """Check that an address may be served like this.

        Parameters
        ----------
        option : str
            That named it.

        Raises
        ------
        StartError
            Others than this machine could reach it, without TLS or without tokens.
        """
        lacking = [
            option
            for option, given in (
                ("--tls-cert and --tls-key", self.tls),
                ("--tokens", self.tokens),
            )
            if given is None
        ]
        if lacking and not self.insecure and not is_loopback(listen):
            raise StartError(
                f"{option} {listen}: other machines can reach this address; add "
                f"{' and '.join(lacking)}, listen on 127.0.0.1, or say --insecure if the "
                "network keeps strangers out"
            )
