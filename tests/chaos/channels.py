"""Connections to schedulers that show a token with every call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import grpc


class _Details(NamedTuple):
    method: str
    timeout: float | None
    metadata: Sequence[tuple[str, str]]
    credentials: grpc.CallCredentials | None
    wait_for_ready: bool | None
    compression: grpc.Compression | None


class _Shows(grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor):
    def __init__(self, token: str) -> None:
        self._metadata = [("authorization", f"Bearer {token}")]

    def intercept_unary_unary(
        self, continuation: Callable[..., Any], details: grpc.ClientCallDetails, request: Any
    ) -> Any:
        return continuation(self._with_token(details), request)

    intercept_unary_stream = intercept_unary_unary

    def _with_token(self, details: grpc.ClientCallDetails) -> _Details:
        return _Details(
            details.method, details.timeout, self._metadata, None, None, None,
        )  # fmt: skip


def connect(address: str, token: str = "", options: Sequence[tuple[str, Any]] = ()) -> grpc.Channel:
    """Return a channel to some of these schedulers."""
    channel = grpc.insecure_channel(f"ipv4:{address}", options=list(options))
    return grpc.intercept_channel(channel, _Shows(token)) if token else channel
