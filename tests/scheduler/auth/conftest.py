from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest
import redis.asyncio
from certificates import Certificates, make_certificates
from reltrace_scheduler.api.server import serving
from reltrace_scheduler.auth.access import Access
from reltrace_scheduler.auth.identity import Role
from reltrace_scheduler.auth.tokens import append, make
from reltrace_scheduler.config import Settings
from reltrace_scheduler.queue.connection import Connection

Serve = Callable[[Access], AbstractAsyncContextManager[str]]


@pytest.fixture
def serve(store: redis.asyncio.Redis, redis_url: str, settings: Settings) -> Serve:
    """Serve on a port of this machine with an access of the test's choice."""

    @asynccontextmanager
    async def serve(access: Access) -> AsyncIterator[str]:
        client = redis.asyncio.Redis.from_url(redis_url)
        async with serving(Connection(client, "test"), settings, access) as address:
            yield address
        await client.aclose()

    return serve


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    return tmp_path / "tokens.toml"


@pytest.fixture
def tokens(token_file: Path) -> dict[str, str]:
    """One token of each role, in the file."""
    made = {}
    for role in Role:
        made[role.value], entry = make(role.value, role)
        append(token_file, entry)
    return made


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="session")
def other_certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """Of an authority that nobody here trusts."""
    return make_certificates(tmp_path_factory.mktemp("other"))
