import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from deploy.rendering import KUBERNETES, OVERLAYS, Rendered, make_secrets, render


@pytest.fixture(scope="session")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_secrets(
        tmp_path_factory.mktemp("made") / "secrets", "reltrace-scheduler", "10.0.0.6"
    )


@pytest.fixture(scope="session")
def manifests(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("manifests") / "kubernetes"
    shutil.copytree(KUBERNETES, copy, ignore=shutil.ignore_patterns("secrets"))
    return copy


@pytest.fixture(scope="session")
def rendered(manifests: Path, secrets: Path) -> Callable[[str], Rendered]:
    """Render an overlay, once."""
    return cache(lambda name: render(name, manifests, secrets))


@pytest.fixture(scope="session", params=OVERLAYS)
def overlay(request: pytest.FixtureRequest, rendered: Callable[[str], Rendered]) -> Rendered:
    return rendered(request.param)
