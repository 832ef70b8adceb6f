"""What every overlay renders to is valid, refers to what there is, and gives away nothing."""

import base64
import re
import shutil
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from deploy.rendering import (
    DRAIN_GRACE,
    KUBERNETES,
    OVERLAYS,
    VARIABLES,
    Object,
    Rendered,
    container,
    environment,
    kustomize,
    maxmemory,
    need_kubectl,
    render,
)

VERSION = "1.32"
CUSTOM = {"ScaledObject", "PodMonitor"}
PINNED = re.compile(r"[\w./:-]+:v?\d+\.\d+\.\d+[\w.-]*")


def test_every_object_fits_its_schema(overlay: Rendered) -> None:
    for made in overlay.objects:
        if made["kind"] not in CUSTOM:
            kubernetes_validate.validate(made, VERSION, strict=True)


def test_the_schemas_find_faults(overlay: Rendered) -> None:
    made = overlay.get("Deployment", "reltrace-scheduler")
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(
            {**made, "spec": {**made["spec"], "replica": 2}}, VERSION, strict=True
        )


@pytest.mark.parametrize("name", OVERLAYS)
def test_without_secrets_nothing_is_rendered(name: str, manifests: Path, tmp_path: Path) -> None:
    need_kubectl()
    copy = tmp_path / "kubernetes"
    shutil.copytree(manifests, copy, ignore=shutil.ignore_patterns("secrets"))
    done = kustomize(copy / "overlays" / name)
    assert done.returncode != 0
    assert "secrets/" in done.stderr


def test_no_secret_is_written_down() -> None:
    for path in KUBERNETES.rglob("*.yaml"):
        if "secrets" in path.parts:
            continue
        for made in yaml.safe_load_all(path.read_text()):
            assert made["kind"] != "Secret", path
            for generated in made.get("secretGenerator", []):
                assert "literals" not in generated, path
                read = [*generated.get("files", []), *generated.get("envs", [])]
                assert read, path
                assert all("secrets/" in file for file in read), path


def test_everything_is_in_one_namespace_that_is_restricted(overlay: Rendered) -> None:
    labels = overlay.get("Namespace", "reltrace")["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    assert {
        made["metadata"].get("namespace") for made in overlay.objects if made["kind"] != "Namespace"
    } == {"reltrace"}


def test_pods_may_do_little(overlay: Rendered) -> None:
    assert set(overlay.pods()) >= {"scheduler", "worker"}
    for pod in overlay.pods().values():
        assert pod["spec"]["automountServiceAccountToken"] is False
        allowed = pod["spec"]["securityContext"]
        assert allowed["runAsNonRoot"] is True
        assert allowed["runAsUser"] > 0
        assert allowed["seccompProfile"] == {"type": "RuntimeDefault"}
        assert container(pod)["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert container(pod)["resources"]["limits"]["memory"]


def test_images_are_pinned(overlay: Rendered) -> None:
    for pod in overlay.pods().values():
        assert PINNED.fullmatch(container(pod)["image"]), container(pod)["image"]


def test_variables_are_options_of_the_commands(overlay: Rendered) -> None:
    for component in ("scheduler", "worker"):
        set_here = environment(overlay, overlay.pods()[component])
        if component == "worker":
            # From the Secret with what opens the bucket; a worker learns its URL from schedulers.
            set_here.pop("RELTRACE_RESULTS_URL", None)
        assert set(set_here) <= VARIABLES[component]


def test_pods_find_what_they_mount(overlay: Rendered) -> None:
    there = {
        (kind, made["metadata"]["name"])
        for kind in ("Secret", "ConfigMap", "PersistentVolumeClaim")
        for made in overlay.of(kind)
    }
    for component, pod in overlay.pods().items():
        volumes = {volume["name"]: volume for volume in pod["spec"].get("volumes", [])}
        claims = {
            claim["metadata"]["name"]
            for made in overlay.of("StatefulSet")
            if made["spec"]["template"] is pod
            for claim in made["spec"]["volumeClaimTemplates"]
        }
        mounts = {mount["name"] for mount in container(pod)["volumeMounts"]}
        assert mounts == set(volumes) | claims, component
        for volume in volumes.values():
            match volume:
                case {"secret": {"optional": True}}:
                    pass
                case {"secret": {"secretName": name}}:
                    assert ("Secret", name) in there
                case {"configMap": {"name": name}}:
                    assert ("ConfigMap", name) in there


def test_files_in_variables_are_mounted(overlay: Rendered) -> None:
    """A path is below a mount, and its last part a key of the secret that is mounted there."""
    for component in ("scheduler", "worker", *({"redis"} & set(overlay.pods()))):
        pod = overlay.pods()[component]
        mounts = {mount["mountPath"]: mount["name"] for mount in container(pod)["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
        for variable, value in environment(overlay, pod).items():
            if not (value or "").startswith("/run/"):
                continue
            folder, _, key = str(value).rpartition("/")
            secret = volumes[mounts[folder]]["secret"]
            if secret.get("optional"):
                assert key == "token", variable
                continue
            keys = {item["path"] for item in secret.get("items", [])}
            data = overlay.get("Secret", secret["secretName"])["data"]
            assert key in (keys or data), variable
            assert keys <= set(data), variable


def test_a_worker_never_gets_the_key_of_a_scheduler(overlay: Rendered) -> None:
    for volume in overlay.pods()["worker"]["spec"]["volumes"]:
        if volume.get("secret", {}).get("secretName") == "reltrace-tls":
            assert [item["key"] for item in volume["secret"]["items"]] == ["ca.crt"]


def test_each_way_in_is_guarded(overlay: Rendered) -> None:
    scheduler, worker = (
        environment(overlay, overlay.pods()[component]) for component in ("scheduler", "worker")
    )
    assert "RELTRACE_TOKENS" in scheduler
    assert "RELTRACE_TOKEN_FILE" in worker
    encrypted = "RELTRACE_LISTEN_TLS_CERT" in scheduler
    assert encrypted == ("RELTRACE_LISTEN_TLS_KEY" in scheduler) == ("RELTRACE_TLS_CA" in worker)
    plain = {"RELTRACE_LISTEN_INSECURE" in scheduler, "RELTRACE_INSECURE" in worker}
    # In the clear only where nothing leaves the machine.
    assert plain == {overlay.name == "one-node"} == {not encrypted}


def test_the_page_is_for_who_forwards_a_port(overlay: Rendered) -> None:
    pod = overlay.pods()["scheduler"]
    host, _, port = str(environment(overlay, pod)["RELTRACE_WEB"]).partition(":")
    assert host == "127.0.0.1"
    assert int(port) not in {port["containerPort"] for port in container(pod)["ports"]}


def test_the_kubelet_asks_for_health_as_the_port_speaks(overlay: Rendered) -> None:
    pod = overlay.pods()["scheduler"]
    encrypted = "RELTRACE_LISTEN_TLS_CERT" in environment(overlay, pod)
    ready, alive = (container(pod)[f"{probe}Probe"] for probe in ("readiness", "liveness"))
    # Its own grpc probe can not speak TLS.
    assert ("grpc" in ready) is not encrypted
    if encrypted:
        assert ready["exec"]["command"] == ["python", "/opt/reltrace/health.py", "ready"]
    else:
        assert ready["grpc"] == {"port": 50051}
    # A Redis that is away is no reason to restart a scheduler.
    assert alive["exec"]["command"] == ["python", "/opt/reltrace/health.py", "alive"]


def test_a_worker_whose_pass_hangs_is_not_alive(overlay: Rendered) -> None:
    alive = container(overlay.pods()["worker"])["livenessProbe"]
    # Metrics are served however long a pass has hung.
    assert alive["httpGet"] == {"path": "/healthz", "port": "metrics"}


def test_probes_name_ports_that_there_are(overlay: Rendered) -> None:
    for pod in overlay.pods().values():
        ports = {port["name"] for port in container(pod)["ports"]}
        for probe in ("startup", "readiness", "liveness"):
            match container(pod).get(f"{probe}Probe", {}):
                case {"httpGet": {"port": port}} | {"tcpSocket": {"port": port}}:
                    assert port in ports


def test_metrics_are_where_prometheus_looks(overlay: Rendered) -> None:
    variable = {"scheduler": "RELTRACE_METRICS", "worker": "RELTRACE_WORKER_METRICS"}
    for component, name in variable.items():
        pod = overlay.pods()[component]
        (port,) = [
            port["containerPort"] for port in container(pod)["ports"] if port["name"] == "metrics"
        ]
        assert environment(overlay, pod)[name] == f"0.0.0.0:{port}"
        assert pod["metadata"]["annotations"]["prometheus.io/port"] == str(port)


def test_a_worker_has_time_to_drain(overlay: Rendered) -> None:
    # Beside the drain: 5 s for the last words, and the start of the process in between.
    needed = DRAIN_GRACE + 5
    assert overlay.pods()["worker"]["spec"]["terminationGracePeriodSeconds"] >= needed + 10
    # As process 1 it would not even get the signal before it is up.
    assert overlay.pods()["worker"]["spec"]["shareProcessNamespace"] is True


def test_schedulers_are_several_behind_a_name_that_gives_them_all(overlay: Rendered) -> None:
    deployment = overlay.get("Deployment", "reltrace-scheduler")
    service = overlay.get("Service", "reltrace-scheduler")
    assert deployment["spec"]["replicas"] >= 2
    assert service["spec"]["clusterIP"] == "None"
    (port,) = service["spec"]["ports"]
    assert environment(overlay, overlay.pods()["worker"])["RELTRACE_SCHEDULER"] == (
        f"dns:///{service['metadata']['name']}:{port['port']}"
    )
    listen = environment(overlay, overlay.pods()["scheduler"])["RELTRACE_LISTEN"]
    assert listen == f"0.0.0.0:{port['port']}"


def test_selectors_select_their_pods(overlay: Rendered) -> None:
    labels = {component: pod["metadata"]["labels"] for component, pod in overlay.pods().items()}

    def selected(selector: dict[str, Any]) -> list[str]:
        return [name for name, own in labels.items() if selector.items() <= own.items()]

    for kind in ("Deployment", "StatefulSet", "PodDisruptionBudget"):
        for made in overlay.of(kind):
            component = made["metadata"]["name"].removeprefix("reltrace-")
            assert selected(made["spec"]["selector"]["matchLabels"]) == [component]
    for made in overlay.of("Service"):
        component = made["metadata"]["name"].removeprefix("reltrace-")
        assert selected(made["spec"]["selector"]) == [component]
    budgets = {made["metadata"]["name"] for made in overlay.of("PodDisruptionBudget")}
    assert budgets == {"reltrace-scheduler", "reltrace-worker"}


def test_redis_is_where_the_schedulers_look(overlay: Rendered) -> None:
    scheduler = environment(overlay, overlay.pods()["scheduler"])
    if overlay.name == "managed-redis":
        assert "redis" not in overlay.pods()
        assert "RELTRACE_REDIS" not in scheduler
        url = overlay.get("Secret", "reltrace-redis")["data"]["url"]
        assert base64.b64decode(url).startswith(b"rediss://")
        return
    service = overlay.get("Service", "reltrace-redis")
    assert scheduler["RELTRACE_REDIS"] == (
        f"redis://{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    )
    redis = overlay.pods()["redis"]
    limit = container(redis)["resources"]["limits"]["memory"]
    config = overlay.get("ConfigMap", redis["spec"]["volumes"][0]["configMap"]["name"])["data"]
    # While its file is written anew, Redis may need what it holds twice.
    assert 2 * maxmemory(config["redis.conf"]) <= int(limit.removesuffix("Gi")) << 30
    assert container(redis)["command"] == [
        "sh", *(f"/etc/reltrace/{name}" for name in ("start.sh", "redis.conf")),
    ]  # fmt: skip
    assert set(config) == {"start.sh", "redis.conf"}


def test_large_results_have_a_place(overlay: Rendered) -> None:
    """The bucket is for the operator to name; whoever writes or deletes there has its keys."""
    for component in ("scheduler", "worker"):
        given = environment(overlay, overlay.pods()[component])
        assert given.get("RELTRACE_RESULTS_URL") == (None if overlay.name == "one-node" else "")


def test_a_bucket_that_is_named_reaches_the_pods(
    manifests: Path, secrets: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "kubernetes"
    shutil.copytree(manifests, copy)
    shutil.copytree(secrets, copy / "overlays" / "gpu" / "secrets", dirs_exist_ok=True)
    before = render("gpu", copy, secrets)
    file = copy / "overlays" / "gpu" / "secrets" / "results.env"
    text = file.read_text().replace("RELTRACE_RESULTS_URL=", "RELTRACE_RESULTS_URL=s3://bucket/x")
    file.write_text(text.replace("#AWS_ACCESS_KEY_ID=", "AWS_ACCESS_KEY_ID=key"))
    made = render("gpu", copy, secrets)
    for component in ("scheduler", "worker"):
        given = environment(made, made.pods()[component])
        assert given["RELTRACE_RESULTS_URL"] == "s3://bucket/x"
        assert given["AWS_ACCESS_KEY_ID"] == "key"
        # Its name changes with it, so that pods are started again.
        assert (
            container(made.pods()[component])["envFrom"]
            != (container(before.pods()[component])["envFrom"])
        )


def test_workers_of_gpu_overlays_have_one_each(overlay: Rendered) -> None:
    limits = container(overlay.pods()["worker"])["resources"]["limits"]
    assert limits.get("nvidia.com/gpu") == (None if overlay.name == "one-node" else "1")


def test_what_can_be_added_to_an_overlay(manifests: Path, secrets: Path, tmp_path: Path) -> None:
    need_kubectl()
    copy = tmp_path / "kubernetes"
    shutil.copytree(manifests, copy)
    kustomization = copy / "overlays" / "gpu" / "kustomization.yaml"
    content = yaml.safe_load(kustomization.read_text())
    content["components"] += ["../../components/podmonitor", "../../components/shared-cache"]
    kustomization.write_text(yaml.safe_dump(content))
    made = render("gpu", copy, secrets)
    worker = made.get("Deployment", "reltrace-worker")
    kubernetes_validate.validate(worker, VERSION, strict=True)
    _check_claim(made)
    monitor = made.get("PodMonitor", "reltrace")
    for pod in (made.pods()["scheduler"], made.pods()["worker"]):
        wanted = monitor["spec"]["selector"]["matchLabels"]
        assert wanted.items() <= pod["metadata"]["labels"].items()
        (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
        assert endpoint["port"] in {port["name"] for port in container(pod)["ports"]}


def _check_claim(made: Rendered) -> None:
    caches: list[Object] = [
        volume for volume in made.pods()["worker"]["spec"]["volumes"] if volume["name"] == "cache"
    ]
    assert caches == [{"name": "cache", "persistentVolumeClaim": {"claimName": "reltrace-models"}}]
    claim = made.get("PersistentVolumeClaim", "reltrace-models")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
