"""TLS on the gRPC port, with certificates that are read again when they change."""

from dataclasses import dataclass
from pathlib import Path

import grpc
import structlog
from reltrace_proto.net import FileValue, read_pem

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class ServerTls:
    """Files in PEM form: certificate (and the chain above it), key, and for mutual TLS the
    authorities whose clients may connect.
    """

    cert: Path
    key: Path
    client_ca: Path | None = None

    def credentials(self) -> grpc.ServerCredentials:
        paths = [path for path in (self.cert, self.key, self.client_ca) if path is not None]
        files = FileValue(self._read, paths, _log_failure)

        def fetch() -> grpc.ServerCertificateConfiguration | None:
            """Return new certificates, or None: those in use stay. Called at every handshake."""
            if not files.refresh():
                return None
            log.info("tls.read", cert=str(self.cert))
            return files.value

        return grpc.dynamic_ssl_server_credentials(
            files.value,
            fetch,  # type: ignore[arg-type]  # None is allowed.
            self.client_ca is not None,
        )

    def _read(self) -> grpc.ServerCertificateConfiguration:
        key = read_pem("--tls-key", self.key, "PRIVATE KEY")
        cert = read_pem("--tls-cert", self.cert, "CERTIFICATE")
        client_ca = None
        if self.client_ca is not None:
            client_ca = read_pem("--tls-client-ca", self.client_ca, "CERTIFICATE")
        return grpc.ssl_server_certificate_configuration([(key, cert)], client_ca)


def _log_failure(error: OSError | ValueError) -> None:
    log.error("tls.unreadable", error=str(error), kept="old certificates")
