"""Certificates for tests: an authority, a server and a client, as files."""

from dataclasses import dataclass
from pathlib import Path

import trustme


@dataclass(frozen=True)
class Certificates:
    """Paths of PEM files; `name` is the host that the server's certificate is for, beside
    127.0.0.1."""

    ca: Path
    server_cert: Path
    server_key: Path
    client_cert: Path
    client_key: Path
    name: str = "scheduler.test"


def make_certificates(folder: Path) -> Certificates:
    """Make an authority of its own for each call."""
    folder.mkdir(parents=True, exist_ok=True)
    authority = trustme.CA()
    made = Certificates(
        *(folder / f"{name}.pem" for name in ("ca", "server", "server-key", "client", "client-key"))
    )
    authority.cert_pem.write_to_path(made.ca)
    for cert, key, names in (
        (made.server_cert, made.server_key, ("127.0.0.1", "localhost", made.name)),
        (made.client_cert, made.client_key, ("alice@client.test",)),
    ):
        issued = authority.issue_cert(*names)
        issued.private_key_pem.write_to_path(key)
        cert.write_bytes(b"".join(part.bytes() for part in issued.cert_chain_pems))
    return made
