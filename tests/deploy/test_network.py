"""The network policies, evaluated as Kubernetes defines them: who reaches whom."""

import ipaddress
from dataclasses import dataclass
from typing import Any

import pytest
from deploy.rendering import Rendered

NAME, COMPONENT = "app.kubernetes.io/name", "app.kubernetes.io/component"


@dataclass(frozen=True)
class Pod:
    """Somebody on the network; with an address it is outside the cluster."""

    namespace: str
    labels: tuple[tuple[str, str], ...] = ()
    address: str | None = None


def ours(component: str) -> Pod:
    return Pod("reltrace", ((NAME, "reltrace"), (COMPONENT, component)))


SCHEDULER, WORKER, REDIS = map(ours, ("scheduler", "worker", "redis"))
CLIENT = Pod("somewhere", (("reltrace-client", "true"),))
NEAR_CLIENT = Pod("reltrace", (("reltrace-client", "true"),))
STRANGER = Pod("somewhere", ((NAME, "reltrace"), (COMPONENT, "scheduler")))
NEAR_STRANGER = Pod("reltrace", (("app", "other"),))
PROMETHEUS = Pod("monitoring", (("app", "prometheus"),))
DNS = Pod("kube-system", (("k8s-app", "kube-dns"),))
HUB = Pod("", address="18.164.174.23")
OTHER_MACHINE = Pod("", address="10.1.2.3")
EVERYBODY = [
    SCHEDULER, WORKER, REDIS, CLIENT, NEAR_CLIENT, STRANGER, NEAR_STRANGER, PROMETHEUS, DNS,
    HUB, OTHER_MACHINE,
]  # fmt: skip


def matches(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    for rule in selector.get("matchExpressions", []):
        assert rule["operator"] == "In"
        if labels.get(rule["key"]) not in rule["values"]:
            return False
    return bool(selector.get("matchLabels", {}).items() <= labels.items())


def is_peer(peer: dict[str, Any], pod: Pod) -> bool:
    if "ipBlock" in peer:
        block, address = peer["ipBlock"], pod.address
        return address is not None and (
            ipaddress.ip_address(address) in ipaddress.ip_network(block["cidr"])
            and not any(
                ipaddress.ip_address(address) in ipaddress.ip_network(hole)
                for hole in block.get("except", [])
            )
        )
    if pod.address is not None:
        return False
    if "namespaceSelector" in peer:
        if not matches(peer["namespaceSelector"], {"kubernetes.io/metadata.name": pod.namespace}):
            return False
    elif pod.namespace != "reltrace":
        return False
    return matches(peer.get("podSelector", {}), dict(pod.labels))


def allows(rendered: Rendered, way: str, one: Pod, other: Pod, port: int, protocol: str) -> bool:
    """Whether the policies of `one` let it be reached by (ingress) or reach (egress) `other`."""
    if one.namespace != "reltrace":
        return True
    policies = [
        made["spec"]
        for made in rendered.of("NetworkPolicy")
        if way.capitalize() in made["spec"]["policyTypes"]
        and matches(made["spec"]["podSelector"], dict(one.labels))
    ]
    # Every pod of the namespace is under the one that denies.
    assert policies
    return any(
        {"protocol": protocol, "port": port} in rule["ports"]
        and any(is_peer(peer, other) for peer in rule["to" if way == "egress" else "from"])
        for policy in policies
        for rule in policy.get(way, [])
    )


def reaches(rendered: Rendered, one: Pod, other: Pod, port: int, protocol: str = "TCP") -> bool:
    return allows(rendered, "egress", one, other, port, protocol) and allows(
        rendered, "ingress", other, one, port, protocol
    )


def who_reaches(rendered: Rendered, pod: Pod, port: int) -> set[Pod]:
    return {one for one in EVERYBODY if one != pod and reaches(rendered, one, pod, port)}


def test_only_schedulers_reach_redis(overlay: Rendered) -> None:
    expected = set() if overlay.name == "managed-redis" else {SCHEDULER}
    assert who_reaches(overlay, REDIS, 6379) == expected


def test_workers_and_clients_reach_schedulers(overlay: Rendered) -> None:
    # A client in this namespace is under the policy that denies: it needs one of its own.
    assert who_reaches(overlay, SCHEDULER, 50051) == {WORKER, CLIENT}
    assert allows(overlay, "ingress", SCHEDULER, NEAR_CLIENT, 50051, "TCP")


@pytest.mark.parametrize(("pod", "port"), [(SCHEDULER, 9464), (WORKER, 9465)])
def test_metrics_are_for_monitoring_alone(overlay: Rendered, pod: Pod, port: int) -> None:
    assert who_reaches(overlay, pod, port) == {PROMETHEUS}


def test_a_worker_has_no_other_way_in(overlay: Rendered) -> None:
    ways_in = [
        port
        for made in overlay.of("NetworkPolicy")
        if matches(made["spec"]["podSelector"], dict(WORKER.labels))
        for rule in made["spec"].get("ingress", [])
        for port in rule["ports"]
    ]
    assert ways_in == [{"protocol": "TCP", "port": 9465}]


def test_workers_reach_the_hub_and_nothing_near(overlay: Rendered) -> None:
    assert reaches(overlay, WORKER, HUB, 443)
    assert not reaches(overlay, WORKER, HUB, 80)
    assert not reaches(overlay, WORKER, OTHER_MACHINE, 443)
    # A bucket for large results.
    assert reaches(overlay, SCHEDULER, HUB, 443) is (overlay.name != "one-node")
    assert not reaches(overlay, SCHEDULER, OTHER_MACHINE, 443)
    assert not reaches(overlay, REDIS, HUB, 443)


def test_names_are_found(overlay: Rendered) -> None:
    for pod in (SCHEDULER, WORKER):
        for protocol in ("UDP", "TCP"):
            assert reaches(overlay, pod, DNS, 53, protocol)
    assert not reaches(overlay, REDIS, DNS, 53)


def test_a_managed_redis_is_reached_by_schedulers_alone(overlay: Rendered) -> None:
    outside = Pod("", address="10.20.0.5")
    managed = overlay.name == "managed-redis"
    assert reaches(overlay, SCHEDULER, outside, 6380) is managed
    assert not reaches(overlay, WORKER, outside, 6380)
