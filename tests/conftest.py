"""What holds for all tests."""

import asyncio
import os
import signal
from collections.abc import Callable, Mapping

import pytest

# As `import reltrace` sets it; gRPC reads it when it is imported, which another test may do first.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

# A shell in the background has the first ignored, nohup the second, and so have their children: the
# commands that tests run.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_asyncio_loop_factories(
    item: pytest.Item,
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Run the tests of the scheduler on the event loop that it runs on."""
    if "scheduler" not in item.path.relative_to(item.config.rootpath).parts:
        return {"asyncio": asyncio.new_event_loop}
    import uvloop

    return {"uvloop": uvloop.new_event_loop}
