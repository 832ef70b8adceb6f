"""TLS on the gRPC port, with certificates that are read again when they change."""

from dataclasses import dataclass
from pathlib import Path

import grpc
import structlog

from reltrace_scheduler.errors import StartError

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class ServerTls:
    """Files in PEM form.

    Parameters
    ----------
    cert : Path
        The server's certificate, and the chain above it.
    key : Path
        Its key.
    client_ca : Path or None
        Certificates of the authorities whose clients may connect (mutual TLS); None: no
        client needs a certificate.
    """

    cert: Path
    key: Path
    client_ca: Path | None = None

    def credentials(self) -> grpc.ServerCredentials:
        """Return what `grpc.aio.Server.add_secure_port` takes.

        Raises
        ------
        StartError
            A file can not be read, or is not PEM.
        """
        files = _Files(self)
        return grpc.dynamic_ssl_server_credentials(
            files.configuration(),
            files.fetch,  # type: ignore[arg-type]  # None is allowed: what is in use stays.
            self.client_ca is not None,
        )


_Contents = tuple[bytes, bytes, bytes | None]


class _Files:
    """The files, looked at by gRPC with every handshake."""

    def __init__(self, tls: ServerTls) -> None:
        self._tls = tls
        self._seen = self._signature()
        try:
            self._served = self._read()
        except OSError as error:
            raise StartError(f"{error.filename}: {error.strerror}") from error
        except ValueError as error:
            raise StartError(str(error)) from error

    def configuration(self) -> grpc.ServerCertificateConfiguration:
        cert, key, ca = self._served
        return grpc.ssl_server_certificate_configuration([(key, cert)], ca)

    def fetch(self) -> grpc.ServerCertificateConfiguration | None:
        """Return new certificates, or None: the ones in use stay."""
        signature = self._signature()
        if signature == self._seen:
            return None
        self._seen = signature
        try:
            self._served = self._read()
        except (OSError, ValueError) as error:
            log.error("tls.unreadable", error=str(error), kept="old certificates")
            return None
        log.info("tls.read", cert=str(self._tls.cert))
        return self.configuration()

    def _signature(self) -> tuple[tuple[int, int, int] | None, ...]:
        paths = (self._tls.cert, self._tls.key, self._tls.client_ca)
        return tuple(_state(path) for path in paths if path is not None)

    def _read(self) -> _Contents:
        cert, key = _pem(self._tls.cert, "CERTIFICATE"), _pem(self._tls.key, "PRIVATE KEY")
        ca = self._tls.client_ca
        return cert, key, None if ca is None else _pem(ca, "CERTIFICATE")


def _state(path: Path) -> tuple[int, int, int] | None:
    try:
        state = path.stat()
    except OSError:
        return None
    return state.st_mtime_ns, state.st_size, state.st_ino


def _pem(path: Path, what: str) -> bytes:
    content = path.read_bytes()
    # gRPC takes anything, and then fails every handshake without a word.
    if f"{what}-----".encode() not in content:
        raise ValueError(f"{path}: holds no {what} in PEM form")
    return content
