"""Alert rules and dashboard ask for metrics that there are."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
MONITORING = ROOT / "deploy" / "monitoring"
PAGES = [ROOT / "scheduler" / "README.md", ROOT / "worker" / "README.md"]
# Tests of scheduler and worker hold these lists against what is exported.
DOCUMENTED = {
    name: {label.strip() for label in labels.split(",") if label.strip()}
    for page in PAGES
    for name, labels in re.findall(
        r"^\| `(reltrace_\w+)` \|([^|]*)\|", page.read_text(), re.MULTILINE
    )
}
HISTOGRAM = re.compile(r"_(?:bucket|count|sum)$")

ALERTS = {
    rule["alert"]: rule["expr"]
    for group in yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"]
    for rule in group["rules"]
}
DASHBOARD = json.loads((MONITORING / "dashboard.json").read_text())
PANELS = {
    f"{panel['title']} {target['refId']}": target["expr"]
    for panel in DASHBOARD["panels"]
    for target in panel.get("targets", [])
}


@pytest.mark.parametrize("expression", [*ALERTS.values(), *PANELS.values()])
def test_metrics_and_labels_are_documented(expression: str) -> None:
    used = re.findall(r"(reltrace_\w+)(?:\{([^}]*)\})?", expression)
    assert used or "ALERTS{" in expression
    for name, selectors in used:
        known = DOCUMENTED.get(name, DOCUMENTED.get(HISTOGRAM.sub("", name)))
        assert known is not None, name
        assert set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selectors)) <= known, name
    for labels in re.findall(r"(?:by|on) \(([^)]*)\)", expression):
        # Of histograms, of Prometheus, and made by label_replace.
        wanted = {label.strip() for label in labels.split(",")} - {"le", "instance", "name"}
        assert wanted <= set().union(*DOCUMENTED.values())


def test_every_metric_is_on_the_dashboard() -> None:
    shown = {
        HISTOGRAM.sub("", name)
        for expression in PANELS.values()
        for name in re.findall(r"reltrace_\w+", expression)
    }
    assert set(DOCUMENTED) - shown <= {
        "reltrace_cluster_jobs_ended_total",
        "reltrace_leases_total",
        # Alerts tell.
        "reltrace_maintenance_failures_total",
        "reltrace_redis_memory_used_ratio",
        "reltrace_worker_silent_seconds",
    }


def test_panels_do_not_overlap() -> None:
    cells = [
        (x, y)
        for panel in DASHBOARD["panels"]
        for place in [panel["gridPos"]]
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_finds_no_fault() -> None:
    done = subprocess.run(
        ["promtool", "check", "config", str(MONITORING / "prometheus.yml")],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
