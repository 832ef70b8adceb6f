"""The wheels: what is in them, and that they install and work without the repository."""

import json
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from e2e.conftest import Process, address_in

ROOT = Path(__file__).parents[2]
PROJECTS = ("proto", "client", "scheduler", "worker")
PROMPT = "My cats love to play with my"


def run(command: list[str], **settings: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in {"PYTHONPATH", "PYTHONWARNINGS"}}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=environment | settings
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("wheels")
    for name in PROJECTS:
        build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out)]
        run([*build, str(ROOT / name)])
    return {path.name.partition("-")[0]: path for path in out.iterdir()}


def environment(folder: Path) -> Path:
    """Make an empty virtual environment and return its `bin`."""
    venv.create(folder, with_pip=True)
    return folder / "bin"


def test_versions_agree() -> None:
    projects = [tomllib.loads((ROOT / name / "pyproject.toml").read_text()) for name in PROJECTS]
    (version,) = {project["project"]["version"] for project in projects}
    for project in projects[1:]:
        dependencies = project["project"]["dependencies"]
        (wire,) = [name for name in dependencies if name.startswith("reltrace-proto")]
        assert wire.partition("==")[2] == version
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.slow
def test_a_wheel_says_what_it_is(wheels: dict[str, Path]) -> None:
    """With a licence, and a README whose links work on another site."""
    assert len(wheels) == len(PROJECTS)
    for path in wheels.values():
        with zipfile.ZipFile(path) as wheel:
            names = wheel.namelist()
            (metadata,) = [name for name in names if name.endswith(".dist-info/METADATA")]
            text = wheel.read(metadata).decode()
        assert any(name.endswith("licenses/LICENSE") for name in names)
        assert any(name.endswith("py.typed") for name in names)
        assert not [name for name in names if "demo_model" in name or "tests/" in name]
        headers = Parser().parsestr(text)
        assert headers["Author"]
        assert headers.get_all("Project-URL")
        assert headers.get_all("Classifier")
        assert len(headers.get_payload()) > 200
        assert not re.findall(r"\]\((?!https?:|#)[^)]*\)", str(headers.get_payload()))


@pytest.mark.slow
def test_the_client_works_alone_with_older_libraries(
    wheels: dict[str, Path], tmp_path: Path, demo_address: str
) -> None:
    """The oldest protobuf and grpcio that pyproject.toml allows; other tests have the newest."""
    commands = environment(tmp_path / "env")
    run([
        str(commands / "python"), "-m", "pip", "--disable-pip-version-check", "install", "--quiet",
        str(wheels["reltrace_proto"]), str(wheels["reltrace"]),
        "protobuf==6.30.*", "grpcio==1.72.2",
    ])  # fmt: skip
    trace = json.loads(
        run([str(commands / "reltrace"), "trace", PROMPT, "--server", demo_address, "--json", "-"])
    )
    assert trace["tokens"][-1].strip() == "my"
    refused = subprocess.run(
        [commands / "reltrace", "up"], capture_output=True, text=True, timeout=60
    )
    assert refused.returncode != 0
    assert "reltrace-scheduler" in refused.stderr


@pytest.mark.slow
def test_the_service_runs_from_wheels_without_lxt(wheels: dict[str, Path], tmp_path: Path) -> None:
    """Only our wheels are installed anew: torch and the others are those of this environment."""
    commands = environment(tmp_path / "env")
    (site,) = (tmp_path / "env").glob("lib/python*/site-packages")
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    # An import of lxt fails, as where it is not installed.
    (site / "lxt.py").write_text("raise ImportError('no lxt here')\n")
    run([
        str(commands / "python"), "-m", "pip", "--disable-pip-version-check", "install", "--quiet",
        "--no-deps", "--ignore-installed", *map(str, wheels.values()),
    ])  # fmt: skip
    where = run(
        [str(commands / "python"), "-c", "import reltrace_worker; print(reltrace_worker.__file__)"]
    )
    assert Path(where.strip()).is_relative_to(tmp_path)
    reltrace = str(commands / "reltrace")
    options = ["--model", "demo", "--port", "0", "--data", str(tmp_path / "data")]
    with (tmp_path / "errors").open("w") as errors:
        started = subprocess.Popen(
            [reltrace, "up", *options],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        )
    service = Process(started, tmp_path / "errors")
    try:
        server = ["--server", address_in(service.first_line())]
        for rule in ("attnlrp", "cp_lrp", "gradient"):
            printed = run([reltrace, "trace", PROMPT, "--rule", rule, *server, "--json", "-"])
            assert json.loads(printed)["provenance"]["rule"] == rule
    finally:
        assert service.stop() == 0, service.errors.read_text()
