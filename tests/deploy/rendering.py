"""The overlays as `kubectl kustomize` renders them, with secrets as `secrets.sh` makes them."""

import base64
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from reltrace_scheduler.__main__ import app as scheduler_app
from reltrace_worker.__main__ import app as worker_app
from reltrace_worker.config import Settings

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
OVERLAYS = sorted(path.name for path in (KUBERNETES / "overlays").iterdir())

# What both commands read beside their options, as their READMEs say.
AWS = {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"}
BESIDE_OPTIONS = {
    "scheduler": {"RELTRACE_REDIS_PASSWORD", *AWS},
    "worker": {"RELTRACE_TOKEN", "HF_HOME", "HF_TOKEN_PATH", *AWS},
}


def _variables(app: typer.Typer) -> set[str]:
    return {str(option.envvar) for option in typer.main.get_command(app).params if option.envvar}


VARIABLES = {
    "scheduler": _variables(scheduler_app) | BESIDE_OPTIONS["scheduler"],
    "worker": _variables(worker_app) | BESIDE_OPTIONS["worker"],
}

DRAIN_GRACE: float = Settings.drain_grace

Object = dict[str, Any]


@dataclass(frozen=True)
class Rendered:
    """What an overlay makes."""

    name: str
    objects: list[Object]

    def of(self, kind: str) -> list[Object]:
        return [made for made in self.objects if made["kind"] == kind]

    def get(self, kind: str, name: str) -> Object:
        (found,) = [made for made in self.of(kind) if made["metadata"]["name"] == name]
        return found

    def pods(self) -> dict[str, Object]:
        """The templates of pods, by component."""
        return {
            made["spec"]["template"]["metadata"]["labels"]["app.kubernetes.io/component"]: made[
                "spec"
            ]["template"]
            for kind in ("Deployment", "StatefulSet")
            for made in self.of(kind)
        }


def maxmemory(config: str) -> int:
    """The bytes that a configuration of Redis gives it."""
    (found,) = re.findall(r"^maxmemory (\d+)gb$", config, re.MULTILINE)
    return int(found) << 30


def container(pod: Object) -> Object:
    (only,) = pod["spec"]["containers"]
    return dict(only)


def environment(rendered: Rendered, pod: Object) -> dict[str, str | None]:
    """The variables of a pod's container; None: set from the pod's own fields."""
    made: dict[str, str | None] = {}
    for source in container(pod).get("envFrom", []):
        if "configMapRef" in source:
            made |= rendered.get("ConfigMap", source["configMapRef"]["name"])["data"]
        else:
            secret = rendered.get("Secret", source["secretRef"]["name"])["data"]
            made |= {name: base64.b64decode(value).decode() for name, value in secret.items()}
    return made | {entry["name"]: entry.get("value") for entry in container(pod)["env"]}


def make_secrets(folder: Path, *names: str) -> Path:
    """Run `secrets.sh` with the scheduler of this checkout."""
    done = subprocess.run(
        ["sh", DEPLOY / "secrets.sh", folder, *names],
        env=os.environ | {"RELTRACE_SCHEDULER": f"{sys.executable} -m reltrace_scheduler"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return folder


def need_kubectl() -> None:
    if shutil.which("kubectl") is None:
        if os.environ.get("CI"):
            pytest.fail("CI renders the overlays: install kubectl there")
        pytest.skip("kubectl is not installed")


def kustomize(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["kubectl", "kustomize", folder], capture_output=True, text=True, timeout=60
    )


def render(name: str, copy: Path, secrets: Path) -> Rendered:
    """Render an overlay of a copy of the manifests, with secrets put where they belong."""
    need_kubectl()
    overlay = copy / "overlays" / name
    if not (overlay / "secrets").exists():
        shutil.copytree(secrets, overlay / "secrets")
        (overlay / "secrets" / "redis-url").write_text("rediss://app:geheim@redis.example:6380")
    done = kustomize(overlay)
    assert done.returncode == 0, done.stderr
    return Rendered(name, list(yaml.safe_load_all(done.stdout)))
