"""The compose file: what it refers to is there, and what it sets is read."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from deploy.rendering import AWS, DEPLOY, DRAIN_GRACE, VARIABLES, maxmemory
from deploy.test_containers import environment as image_environment

COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = {
    name: service["image"].partition(":")[0].removeprefix("reltrace-")
    for name, service in SERVICES.items()
    if service["image"].startswith("reltrace-")
}
RESULTS = "/var/lib/reltrace/results"
each_service = pytest.mark.parametrize("name", sorted(SERVICES))
each_of_ours = pytest.mark.parametrize("name", sorted(OURS))


def filled(value: object) -> str:
    """What compose makes of a value where no variable is set."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", str(value))


def mounts(service: dict[str, Any]) -> list[tuple[str, str]]:
    """Where a service's volumes come from, and where they are in it."""
    return [
        tuple(volume.split(":")[:2])
        if isinstance(volume, str)
        else (volume["source"], volume["target"])
        for volume in service.get("volumes", [])
    ]


def seconds(text: str) -> int:
    found = re.fullmatch(r"(\d+)(s|m)", text)
    assert found, text
    return int(found[1]) * {"s": 1, "m": 60}[found[2]]


def test_who_takes_part() -> None:
    assert sorted(OURS.values()) == ["scheduler", "scheduler", "worker", "worker"]
    assert set(SERVICES) - set(OURS) == {"redis", "prometheus", "grafana"}
    profiles = {name: SERVICES[name].get("profiles") for name in SERVICES}
    assert profiles["worker"] == ["gpu"]
    assert profiles["worker-cpu"] == ["cpu"]
    assert all(found is None for name, found in profiles.items() if OURS.get(name) != "worker")


@each_service
def test_images_are_pinned(name: str) -> None:
    assert re.fullmatch(r"[\w/-]+:v?\d+\.\d+\.\d+[\w.-]*", SERVICES[name]["image"])


@each_service
def test_what_a_service_refers_to_is_there(name: str) -> None:
    service = SERVICES[name]
    for kind in ("networks", "secrets"):
        assert set(service.get(kind, [])) <= set(COMPOSE[kind])
    for source, _ in mounts(service):
        if source == RESULTS:
            continue
        assert source in COMPOSE["volumes"] or (
            source.startswith("./") and (DEPLOY / source).exists()
        )
    for other, wanted in service.get("depends_on", {}).items():
        assert "profiles" not in SERVICES[other]
        # Ours have their check in the image.
        assert wanted["condition"] == "service_healthy"
        assert "healthcheck" in SERVICES[other] or other in OURS


def test_nothing_is_declared_in_vain() -> None:
    used = {
        kind: {
            entry.partition(":")[0] if isinstance(entry, str) else entry["source"]
            for service in SERVICES.values()
            for entry in service.get(kind, [])
        }
        for kind in ("networks", "secrets", "volumes")
    }
    for kind, names in used.items():
        assert set(COMPOSE[kind]) <= names, kind


@each_service
def test_services_may_do_little(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]


@each_of_ours
def test_variables_are_options_of_the_commands(name: str) -> None:
    assert set(SERVICES[name]["environment"]) <= VARIABLES[OURS[name]]


@each_of_ours
def test_images_are_built_from_files_that_there_are(name: str) -> None:
    build = SERVICES[name]["build"]
    context = (DEPLOY / build["context"]).resolve()
    assert (context / build["dockerfile"]).is_file()
    assert build["dockerfile"].endswith(f"/{OURS[name]}.Containerfile")
    text = (context / build["dockerfile"]).read_text()
    for argument in build.get("args", {}):
        assert re.search(rf"^ARG {argument}\b", text, re.MULTILINE)


@each_service
def test_secrets_in_variables_are_given_to_the_service(name: str) -> None:
    service = SERVICES[name]
    read = {
        str(value).removeprefix("/run/secrets/")
        for value in service.get("environment", {}).values()
        if str(value).startswith("/run/secrets/")
    }
    assert read == set(service.get("secrets", []))


def test_no_secret_stands_in_the_file() -> None:
    for secret in COMPOSE["secrets"].values():
        assert list(secret) == ["file"]
        assert secret["file"].startswith("./secrets/")
    assert "secrets/" in (DEPLOY / ".gitignore").read_text().splitlines()
    for service in SERVICES.values():
        for variable, value in service.get("environment", {}).items():
            if re.search("PASSWORD|TOKEN|KEY", variable):
                # None: as it is set where compose runs.
                assert value is None or str(value).startswith("/run/secrets/"), variable


def test_secrets_are_those_that_the_script_makes(secrets: Path) -> None:
    made = {path.name for path in secrets.iterdir()}
    wanted = {secret["file"].removeprefix("./secrets/") for secret in COMPOSE["secrets"].values()}
    assert wanted <= made
    assert made - wanted == {"client.token", "operator.token", "results.env"}


def test_only_schedulers_share_a_network_with_redis() -> None:
    assert SERVICES["redis"]["networks"] == ["store"]
    assert COMPOSE["networks"]["store"]["internal"] is True
    there = {name for name, service in SERVICES.items() if "store" in service["networks"]}
    assert there == {"redis", "scheduler-1", "scheduler-2"}
    assert "ports" not in SERVICES["redis"]


def test_nothing_is_published_to_other_machines_unasked() -> None:
    published = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert len(published) == 6
    for port in published:
        assert port.startswith(("127.0.0.1:", "${RELTRACE_BIND:-127.0.0.1}:"))


def test_the_page_is_for_this_machine() -> None:
    for name, component in OURS.items():
        if component == "scheduler":
            port = SERVICES[name]["environment"]["RELTRACE_WEB"].rpartition(":")[2]
            (published,) = [p for p in SERVICES[name]["ports"] if p.endswith(f":{port}")]
            assert published.startswith("127.0.0.1:")


def test_workers_know_all_schedulers() -> None:
    schedulers = [name for name, component in OURS.items() if component == "scheduler"]
    listen = SERVICES[schedulers[0]]["environment"]["RELTRACE_LISTEN"].rpartition(":")[2]
    expected = ",".join(f"{name}:{listen}" for name in schedulers)
    for name, component in OURS.items():
        if component == "worker":
            assert SERVICES[name]["environment"]["RELTRACE_SCHEDULER"] == expected
            shared = set(SERVICES[name]["networks"]) & set(SERVICES[schedulers[0]]["networks"])
            assert "service" in shared


def test_workers_have_time_to_drain() -> None:
    for name, component in OURS.items():
        if component == "worker":
            assert seconds(SERVICES[name]["stop_grace_period"]) >= DRAIN_GRACE + 15


def test_models_are_kept() -> None:
    for name, component in OURS.items():
        if component == "worker":
            ((_, folder),) = [one for one in mounts(SERVICES[name]) if one[0] == "models"]
            assert SERVICES[name]["environment"]["HF_HOME"].startswith(f"{folder}/")
            assert image_environment("worker")["HF_HOME"].startswith(f"{folder}/")


def test_large_results_have_a_place() -> None:
    """A folder that is under one path for everybody, clients on this machine among them."""
    for name, component in OURS.items():
        assert (RESULTS, RESULTS) in mounts(SERVICES[name])
        given = SERVICES[name]["environment"]
        assert {key for key, value in given.items() if value is None} == AWS
        if component == "scheduler":
            assert filled(given["RELTRACE_RESULTS_URL"]) == f"file://{RESULTS}"
    assert f"install -d -o 10001 -g 10001 {RESULTS}\n" in (DEPLOY / "README.md").read_text()


def test_redis_has_memory_to_write_its_file_anew() -> None:
    (folder,) = [
        source for source, target in mounts(SERVICES["redis"]) if target == "/etc/reltrace"
    ]
    config = (DEPLOY / folder / "redis.conf").read_text()
    limit = SERVICES["redis"]["mem_limit"]
    assert 2 * maxmemory(config) <= int(limit.removesuffix("g")) << 30


def test_prometheus_reads_everybody() -> None:
    service = SERVICES["prometheus"]
    (config,) = [option for option in service["command"] if option.startswith("--config.file=")]
    assert config == "--config.file=/etc/reltrace/compose.yml"
    jobs = {
        job["job_name"]: job
        for job in yaml.safe_load((DEPLOY / "monitoring" / "compose.yml").read_text())[
            "scrape_configs"
        ]
    }
    port = SERVICES["scheduler-1"]["environment"]["RELTRACE_METRICS"].rpartition(":")[2]
    (static,) = jobs["reltrace-scheduler"]["static_configs"]
    assert static["targets"] == [
        f"{name}:{port}" for name, component in OURS.items() if component == "scheduler"
    ]
    (found,) = jobs["reltrace-worker"]["dns_sd_configs"]
    assert found["names"] == [name for name, component in OURS.items() if component == "worker"]
    port = SERVICES["worker"]["environment"]["RELTRACE_WORKER_METRICS"].rpartition(":")[2]
    assert str(found["port"]) == port
    assert all("monitoring" in SERVICES[name]["networks"] for name in [*OURS, "prometheus"])


def test_grafana_finds_prometheus_and_the_dashboard() -> None:
    mounts = dict(volume.split(":")[:2] for volume in SERVICES["grafana"]["volumes"])
    provisioning = DEPLOY / "monitoring" / "grafana"
    assert mounts["./monitoring/grafana"] == "/etc/grafana/provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())[
        "datasources"
    ]
    assert source["url"] == "http://prometheus:9090"
    # The dashboard takes the default one.
    assert source["isDefault"] is True
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "reltrace.yml").read_text())[
        "providers"
    ]
    assert provider["options"]["path"] == mounts["./monitoring/dashboard.json"]
