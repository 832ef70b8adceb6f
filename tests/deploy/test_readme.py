"""What deploy/README.md names is there, and its figures are those of the files."""

import re
from collections.abc import Callable

from deploy.rendering import DEPLOY, KUBERNETES, OVERLAYS, ROOT, Rendered, container
from deploy.test_compose import SERVICES

README = (DEPLOY / "README.md").read_text()


def test_paths_exist() -> None:
    named = set(re.findall(r"(?<![\w/])(?:tests/)?deploy/[\w./-]*[\w-]", README))
    named -= {path for path in named if "/secrets/" in path or path.endswith("/secrets")}
    assert named >= {"deploy/compose.yaml", "deploy/kubernetes/overlays/gpu"}
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []
    table = README[: README.index("**What has not")]
    for path in re.findall(r"`([\w./-]+)`(?=[^|]*\|[^|]+\|\n)", table):
        assert (DEPLOY / path).exists(), path


def test_overlays_and_components_are_named() -> None:
    for overlay in OVERLAYS:
        assert f"| `{overlay}` |" in README
    for component in ("shared-cache", "podmonitor"):
        assert f"`../../components/{component}`" in README
        assert (KUBERNETES / "components" / component / "kustomization.yaml").exists()


def test_images_have_the_names_that_are_built(rendered: Callable[[str], Rendered]) -> None:
    built = set(re.findall(r"-t (reltrace-[\w:.-]+)", README))
    compose = {service["image"] for service in SERVICES.values()}
    pods = [pod for name in OVERLAYS for pod in rendered(name).pods().values()]
    assert built == {
        image
        for image in compose | {container(pod)["image"] for pod in pods}
        if image.startswith("reltrace-")
    }


def test_figures_of_scaling(rendered: Callable[[str], Rendered]) -> None:
    spec = rendered("gpu").get("ScaledObject", "reltrace-worker")["spec"]
    (trigger,) = spec["triggers"]
    down = spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]["scaleDown"]
    for said in (
        f"every {spec['pollingInterval']} s",
        f"a worker per {trigger['metadata']['threshold']} of them",
        f"{spec['cooldownPeriod'] // 60} minutes after the last job",
        f"{spec['minReplicaCount']} to {spec['maxReplicaCount']}, a GPU each",
    ):
        assert said in README
    assert (spec["initialCooldownPeriod"], down["stabilizationWindowSeconds"]) == (3600, 600)
    assert down["policies"] == [{"type": "Pods", "value": 1, "periodSeconds": 120}]
    pod = rendered("gpu").pods()["worker"]
    assert f"The pod has {pod['spec']['terminationGracePeriodSeconds']} s" in README
