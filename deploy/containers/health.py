"""Asks the process of this container how it is; exit code 0: well.

``ready``: the scheduler serves (grpc.health.v1 says SERVING: Redis takes writes).
``alive``: the scheduler answers at all. While Redis is away a restart would heal nothing.
``worker``: the worker has its model, answers, and what it computes goes on.

With TLS the scheduler is asked under the name ``localhost``, which its certificate holds beside
others. The certificate itself is the authority: this asks about health, not about identity.
"""

import os
import sys
import urllib.request
from pathlib import Path

TIMEOUT = 5.0


def _local(listen: str) -> str:
    host, _, port = listen.rpartition(":")
    return f"127.0.0.1:{port}" if host == "0.0.0.0" else listen


def scheduler(*, alive: bool) -> bool:
    """Return whether the scheduler serves, or, if `alive`, whether it answers."""
    # Only here: the worker's probe needs none of it.
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    address = _local(os.environ["RELTRACE_LISTEN"])
    certificate = os.environ.get("RELTRACE_LISTEN_TLS_CERT")
    if certificate:
        channel = grpc.secure_channel(
            address,
            grpc.ssl_channel_credentials(Path(certificate).read_bytes()),
            [("grpc.ssl_target_name_override", "localhost"), ("grpc.enable_http_proxy", 0)],
        )
    else:
        channel = grpc.insecure_channel(address, [("grpc.enable_http_proxy", 0)])
    with channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=TIMEOUT
            )
        except grpc.RpcError as error:
            # gRPC's own text takes many lines.
            raise ConnectionError(f"{address}: {error.details()}") from None
    return alive or answer.status == health_pb2.HealthCheckResponse.SERVING


def worker() -> bool:
    """Return whether the worker says that it is well; raises HTTPError where it is not."""
    url = f"http://{_local(os.environ['RELTRACE_WORKER_METRICS'])}/healthz"
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(url, timeout=TIMEOUT) as answer:
        return bool(answer.read() == b"ok\n")


def main() -> int:
    """Run the check named by the only argument."""
    checks = {
        "ready": lambda: scheduler(alive=False),
        "alive": lambda: scheduler(alive=True),
        "worker": worker,
    }
    if len(sys.argv) != 2 or sys.argv[1] not in checks:
        print(f"usage: health.py {'|'.join(checks)}", file=sys.stderr)
        return 2
    try:
        well = checks[sys.argv[1]]()
    except Exception as error:
        # Whatever it is: whoever reads a container's health wants one line.
        print(f"health: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    if not well:
        print("health: not serving", file=sys.stderr)
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
