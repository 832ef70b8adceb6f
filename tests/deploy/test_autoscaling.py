"""The ScaledObject holds what KEDA reads, and asks for what there is to do."""

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import jsonschema
import pytest
import yaml
from deploy.rendering import Object, Rendered, environment
from deploy.test_monitoring import DOCUMENTED

COUNT = {"type": "integer", "minimum": 0}
RULES = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "stabilizationWindowSeconds": {**COUNT, "maximum": 3600},
        "selectPolicy": {"enum": ["Max", "Min", "Disabled"]},
        "policies": {
            "type": "array",
            "items": {
                "type": "object",
                "additionalProperties": False,
                "required": ["type", "value", "periodSeconds"],
                "properties": {
                    "type": {"enum": ["Pods", "Percent"]},
                    "value": {"type": "integer", "minimum": 1},
                    "periodSeconds": {"type": "integer", "minimum": 1, "maximum": 1800},
                },
            },
        },
    },
}
# What KEDA 2.x documents of a ScaledObject and its Prometheus trigger, as far as it is used here.
SPEC = {
    "type": "object",
    "additionalProperties": False,
    "required": ["scaleTargetRef", "triggers"],
    "properties": {
        "scaleTargetRef": {
            "type": "object",
            "additionalProperties": False,
            "required": ["name"],
            "properties": {name: {"type": "string"} for name in ("apiVersion", "kind", "name")},
        },
        **dict.fromkeys(
            ("minReplicaCount", "maxReplicaCount", "pollingInterval", "cooldownPeriod"), COUNT
        ),
        "initialCooldownPeriod": COUNT,
        "advanced": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "restoreToOriginalReplicaCount": {"type": "boolean"},
                "horizontalPodAutoscalerConfig": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {
                        "behavior": {
                            "type": "object",
                            "additionalProperties": False,
                            "properties": {"scaleUp": RULES, "scaleDown": RULES},
                        }
                    },
                },
            },
        },
        "triggers": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "additionalProperties": False,
                "required": ["type", "metadata"],
                "properties": {
                    "type": {"const": "prometheus"},
                    "metricType": {"enum": ["AverageValue", "Value"]},
                    "metadata": {
                        "type": "object",
                        "additionalProperties": False,
                        "required": ["serverAddress", "query", "threshold"],
                        # KEDA takes strings alone.
                        "properties": {
                            "serverAddress": {"type": "string", "pattern": "^https?://"},
                            "query": {"type": "string"},
                            "threshold": {"type": "string", "pattern": r"^\d+(\.\d+)?$"},
                            "activationThreshold": {"type": "string", "pattern": r"^\d+$"},
                            "ignoreNullValues": {"enum": ["true", "false"]},
                        },
                    },
                },
            },
        },
    },
}

MODEL = "Qwen/Qwen3-8B"


@pytest.fixture(scope="module", params=["gpu", "managed-redis"])
def scaled(request: pytest.FixtureRequest, rendered: Callable[[str], Rendered]) -> Rendered:
    return rendered(request.param)


def trigger(rendered: Rendered) -> Object:
    (only,) = rendered.get("ScaledObject", "reltrace-worker")["spec"]["triggers"]
    return dict(only)


def test_it_holds_what_keda_reads(scaled: Rendered) -> None:
    made = scaled.get("ScaledObject", "reltrace-worker")
    assert made["apiVersion"] == "keda.sh/v1alpha1"
    jsonschema.validate(made["spec"], SPEC)


def test_it_scales_the_workers_and_nothing_else_does(scaled: Rendered) -> None:
    spec = scaled.get("ScaledObject", "reltrace-worker")["spec"]
    worker = scaled.get("Deployment", spec["scaleTargetRef"]["name"])
    # A number there would undo, with every apply, what was scaled.
    assert "replicas" not in worker["spec"]
    assert spec["minReplicaCount"] == 0
    # A model must be announced once before jobs for it are accepted.
    assert spec["initialCooldownPeriod"] >= 1800


def test_the_query_asks_for_documented_metrics(scaled: Rendered) -> None:
    query = trigger(scaled)["metadata"]["query"]
    used = re.findall(r"(reltrace_\w+)(?:\{(\w+)=)?", query)
    assert {name for name, _ in used} >= {"reltrace_queue_jobs", "reltrace_leased_jobs"}
    for name, label in used:
        assert name in DOCUMENTED
        assert not label or label in DOCUMENTED[name]
    for labels in re.findall(r"by \(([^)]*)\)", query):
        assert set(labels.split(", ")) <= DOCUMENTED["reltrace_queue_jobs"]


def test_the_query_asks_for_the_model_that_is_served(scaled: Rendered) -> None:
    served = environment(scaled, scaled.pods()["worker"])["RELTRACE_MODEL_NAME"]
    assert served == MODEL
    query = trigger(scaled)["metadata"]["query"]
    assert f'vector(1), "name", "{served}", "", "")' in query
    assert "MODEL" not in query


def test_no_number_is_no_reason_to_scale(scaled: Rendered) -> None:
    # With a trigger in error and no fallback, KEDA leaves the workers as many as they are.
    assert trigger(scaled)["metadata"]["ignoreNullValues"] == "false"
    assert "fallback" not in scaled.get("ScaledObject", "reltrace-worker")["spec"]


QUEUES = {
    # (metric, scheduler, tenant, priority), or with a revision: jobs
    "one scheduler sees it": ({("queue", "a", "t", "batch"): 7}, 7),
    "two schedulers see the same": (
        {("queue", "a", "t", "batch"): 7, ("queue", "b", "t", "batch"): 7},
        7,
    ),
    "tenants and priorities add up": (
        {
            ("queue", "a", "t", "batch"): 7,
            ("queue", "b", "t", "batch"): 7,
            ("queue", "a", "t", "interactive"): 1,
            ("queue", "a", "u", "batch"): 30,
        },
        38,
    ),
    "what is at workers counts": (
        {("queue", "a", "t", "batch"): 0, ("leased", "a", "t", "batch"): 5},
        5,
    ),
    "jobs for one revision count": (
        {("queue", "a", "t", "batch"): 7, ("queue", "a", "t", "batch", "@r1"): 5},
        12,
    ),
    "no job": ({}, 0),
}


@pytest.mark.parametrize("case", [*QUEUES, "Redis is away", "nobody is read"])
def test_the_query_gives(case: str, rendered: Callable[[str], Rendered], tmp_path: Path) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed")
    queues, expected = QUEUES.get(case, ({}, None))
    series = {
        f'reltrace_{kind}_jobs{{instance="{scheduler}",model="{"".join((model, *revision))}",'
        f'tenant="{tenant}",priority="{priority}"}}': jobs if model == MODEL else 1000
        for (kind, scheduler, tenant, priority, *revision), jobs in queues.items()
        for model in (MODEL, f"{MODEL}-Base", "another")
    }
    # Schedulers always give both.
    for name in list(series):
        series.setdefault(name.replace("_queue_", "_leased_"), 0)
        series.setdefault(name.replace("_leased_", "_queue_"), 0)
    if case != "nobody is read":
        up = 0 if case == "Redis is away" else 1
        series |= {f'reltrace_redis_up{{instance="{scheduler}"}}': up for scheduler in "ab"}
    test = {
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": [
                    {"series": name, "values": f"{value}x5"} for name, value in series.items()
                ],
                "promql_expr_test": [
                    {
                        "expr": trigger(rendered("gpu"))["metadata"]["query"],
                        "eval_time": "3m",
                        "exp_samples": []
                        if expected is None
                        else [{"labels": "{}", "value": expected}],
                    }
                ],
            }
        ],
    }
    (tmp_path / "test.yml").write_text(yaml.safe_dump(test))
    done = subprocess.run(
        ["promtool", "test", "rules", "test.yml"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
