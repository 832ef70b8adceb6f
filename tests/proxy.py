"""A proxy for the web, as a company puts between its machines and others."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def proxy_to(address: str) -> Iterator[tuple[str, list[str]]]:
    """Run a proxy that connects whoever asks to `address`; give its own, and what it was asked."""
    asked: list[str] = []
    host, _, port = address.rpartition(":")
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def accept() -> None:
            with suppress(OSError):
                while True:
                    ours, _ = listening.accept()
                    head = b""
                    while b"\r\n\r\n" not in head:
                        head += ours.recv(4096)
                    asked.append(head.split()[1].decode())
                    ours.sendall(b"HTTP/1.1 200 connected\r\n\r\n")
                    its = socket.create_connection((host, int(port)))
                    for pair in ((ours, its), (its, ours)):
                        threading.Thread(target=_pass_on, args=pair, daemon=True).start()

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", asked
        listening.shutdown(socket.SHUT_RDWR)
        thread.join()


def _pass_on(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError), source, sink:
        while data := source.recv(65536):
            sink.sendall(data)
