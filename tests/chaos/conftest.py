from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from chaos.cluster import Cluster


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Cluster]]:
    """Start a service that ends with the test."""
    with ExitStack() as services:

        def start(**options: Any) -> Cluster:
            return services.enter_context(Cluster(tmp_path, **options))

        yield start
