"""A name server for tests: every name has the same addresses."""

import socket
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

_A = 1


@contextmanager
def nameserver(addresses: Sequence[str]) -> Iterator[str]:
    """Answer questions over UDP until the block ends; gives HOST:PORT for a dns:// address."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{server.getsockname()[1]}"
        ending = threading.Event()

        def serve() -> None:
            while True:
                question, asker = server.recvfrom(4096)
                if ending.is_set():
                    return
                server.sendto(_answer(question, addresses), asker)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield address
        ending.set()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as last:
            last.sendto(b"", server.getsockname())
        thread.join(5)


def _answer(question: bytes, addresses: Sequence[str]) -> bytes:
    """Answer one question (RFC 1035, section 4): its header, itself, and the records."""
    end = 12
    while question[end]:
        end += question[end] + 1
    end += 5
    (kind,) = struct.unpack(">H", question[end - 4 : end - 2])
    records = [
        # The name by a pointer to the question's, class IN, to be forgotten after a second.
        b"\xc0\x0c" + struct.pack(">HHIH", _A, 1, 1, 4) + socket.inet_aton(address)
        for address in (addresses if kind == _A else ())
    ]
    header = question[:2] + struct.pack(">HHHHH", 0x8580, 1, len(records), 0, 0)
    return header + question[12:end] + b"".join(records)
