"""TLS on the gRPC port and the page, with certificates that are read again when they change."""

import ssl
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
        files = FileValue(self._read, self._paths, _log_failure)

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

    def context(self) -> ssl.SSLContext:
        """Return the same for Python's own TLS."""
        files = FileValue(self._read_context, self._paths, _log_failure)

        def refresh(connection: ssl.SSLObject, name: str | None, first: ssl.SSLContext) -> None:
            """Use new certificates. Called at every handshake."""
            if files.refresh():
                log.info("tls.read", cert=str(self.cert))
            connection.context = files.value

        first = files.value
        first.sni_callback = refresh
        return first

    @property
    def _paths(self) -> list[Path]:
        return [path for path in (self.cert, self.key, self.client_ca) if path is not None]

    def _read_context(self) -> ssl.SSLContext:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(self.cert, self.key)
        if self.client_ca is not None:
            context.load_verify_locations(self.client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    def _read(self) -> grpc.ServerCertificateConfiguration:
        key = read_pem("--tls-key", self.key, "PRIVATE KEY")
        cert = read_pem("--tls-cert", self.cert, "CERTIFICATE")
        client_ca = None
        if self.client_ca is not None:
            client_ca = read_pem("--tls-client-ca", self.client_ca, "CERTIFICATE")
        return grpc.ssl_server_certificate_configuration([(key, cert)], client_ca)


def _log_failure(error: OSError | ValueError) -> None:
    log.error("tls.unreadable", error=str(error), kept="old certificates")
