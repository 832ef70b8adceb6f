"""Stands in for the scheduler of `reltrace up`: says that models are served once workers live.

What happens is written to the file EVENTS: one line per event, "name event pid".
"""

from __future__ import annotations

import os
import signal
import sys
from concurrent import futures
from pathlib import Path

import grpc
from reltrace_proto.v1 import trace_pb2, trace_pb2_grpc

EVENTS = Path(os.environ["EVENTS"])


class Service(trace_pb2_grpc.TraceServiceServicer):
    def ListModels(self, request, context):  # noqa: N802
        started = [line.split()[3] for line in EVENTS.read_text().splitlines() if "start" in line]
        response = trace_pb2.ListModelsResponse()
        for name in sorted(set(started) - {"-"}):
            response.models.add(workers=started.count(name)).model.name = name
        return response


def note(event: str) -> None:
    with EVENTS.open("a") as file:
        file.write(f"scheduler {event} {os.getpid()} -\n")


def main() -> None:
    address = sys.argv[sys.argv.index("--listen") + 1]
    server = grpc.server(futures.ThreadPoolExecutor(4))
    trace_pb2_grpc.add_TraceServiceServicer_to_server(Service(), server)
    assert server.add_insecure_port(address)
    note("start")
    server.start()
    signal.signal(signal.SIGTERM, lambda *_: (note("stop"), os._exit(0)))
    print("arguments", sys.argv[1:], "redis", os.environ.get("RELTRACE_REDIS"), flush=True)
    print("told", *sorted(name for name in os.environ if name.startswith("RELTRACE_")), flush=True)
    server.wait_for_termination()


main()
