"""Each alert fires where it should, and is silent where all is well; time is promtool's."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from deploy.rendering import DEPLOY

RULES = DEPLOY / "monitoring" / "alerts.yml"
NAMES = {
    rule["alert"]
    for group in yaml.safe_load(RULES.read_text())["groups"]
    for rule in group["rules"]
}

# Minutes of a stack that is well: series, and their values minute by minute.
WELL = {
    "reltrace_redis_up": "1x120",
    "reltrace_redis_memory_used_ratio": "0.5x60 0.9 0.5x59",
    'reltrace_workers{model="m"}': "1x120",
    'reltrace_queue_jobs{model="m",tenant="t",priority="batch"}': "5000x120",
    'reltrace_queue_jobs{model="m@r1",tenant="t",priority="batch"}': "3x120",
    'reltrace_queue_oldest_seconds{model="m",tenant="t",priority="batch"}': "3000x120",
    'reltrace_queue_oldest_seconds{model="m",tenant="t",priority="interactive"}': "5x120",
    'reltrace_leases_total{model="m"}': "0+600x120",
    'reltrace_leases_lost_total{model="m"}': "0x120",
    'reltrace_attempts_failed_total{model="m"}': "0+6x120",
    'reltrace_jobs_ended_total{model="m",state="succeeded"}': "0+600x120",
    'reltrace_maintenance_failures_total{step="expire"}': "0x60 3x60",
    'reltrace_grpc_seconds_count{method="SubmitJobs",code="INVALID_ARGUMENT"}': "0+600x120",
    'reltrace_worker_silent_seconds{instance="w"}': "0x60 20x60",
    'reltrace_worker_tokens_total{model="m"}': "0+5000x120",
    'reltrace_worker_capacity_tokens_total{model="m"}': "0+10000x120",
}
QUARANTINED = 'reltrace_jobs_ended_total{model="m",state="quarantined"}'
# What goes wrong: series (None: gone), and the minutes at which its alert does not fire, and does.
WRONG: dict[str, tuple[str, dict[str, str | None], int, int]] = {
    "Redis is away": ("ReltraceRedisDown", {"reltrace_redis_up": "0x120"}, 0, 2),
    "no scheduler is up": ("ReltraceRedisDown", {"reltrace_redis_up": None}, 0, 2),
    "nobody reads results": (
        "ReltraceRedisFull", {"reltrace_redis_memory_used_ratio": "0.5x20 0.8x100"}, 20, 30,
    ),
    "the last worker has left": (
        "ReltraceNoWorker", {'reltrace_workers{model="m"}': "1x10 0x110"}, 14, 17,
    ),
    "a revision waits, and no worker has its model": (
        "ReltraceNoWorker",
        {'reltrace_queue_jobs{model="other@r1",tenant="t",priority="batch"}': "3x120"}, 3, 7,
    ),
    "somebody waits": (
        "ReltraceInteractiveWaits",
        {'reltrace_queue_oldest_seconds{model="m",tenant="t",priority="interactive"}': "0+60x120"},
        5, 10,
    ),
    "workers fall silent": (
        "ReltraceLeasesLost", {'reltrace_leases_lost_total{model="m"}': "0x20 1+6x100"}, 20, 40,
    ),
    "a pass hangs": (
        "ReltracePassStandsStill",
        {'reltrace_worker_silent_seconds{instance="w"}': "0x20 0+60x100"}, 20, 30,
    ),
    "a first job is quarantined": ("ReltraceQuarantined", {QUARANTINED: "_x20 1x100"}, 19, 22),
    "another is": ("ReltraceQuarantined", {QUARANTINED: "1x80 2x40"}, 75, 85),
    "attempts fail": (
        "ReltraceAttemptsFail",
        {'reltrace_attempts_failed_total{model="m"}': "0x20 0+60x100"}, 20, 45,
    ),
    "a step of the maintenance fails again and again": (
        "ReltraceMaintenanceFails",
        {'reltrace_maintenance_failures_total{step="expire"}': "0x20 0+1x100"}, 20, 30,
    ),
    "a scheduler is at fault": (
        "ReltraceCallsFail",
        {'reltrace_grpc_seconds_count{method="SubmitJobs",code="INTERNAL"}': "0x20 0+1x100"},
        20, 30,
    ),
    "passes are empty": (
        "ReltracePassesAreEmpty",
        {'reltrace_worker_tokens_total{model="m"}': "0+1000x120"}, 10, 60,
    ),
}  # fmt: skip


def ask(folder: Path, series: dict[str, str | None], counts: list[tuple[str, int, int]]) -> None:
    """Have promtool count what fires of an alert (a pattern) at a minute."""
    if shutil.which("promtool") is None:
        if os.environ.get("CI"):
            pytest.fail("CI tests alert rules: install prometheus there")
        pytest.skip("promtool is not installed")
    tests = {
        "rule_files": [str(RULES)],
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": [
                    {"series": name, "values": values}
                    for name, values in series.items()
                    if values is not None
                ],
                "promql_expr_test": [
                    {
                        "expr": f'count(ALERTS{{alertname=~"{alert}", alertstate="firing"}})',
                        "eval_time": f"{minute}m",
                        "exp_samples": [{"labels": "{}", "value": count}] if count else [],
                    }
                    for alert, minute, count in counts
                ],
            }
        ],
    }
    (folder / "test.yml").write_text(yaml.safe_dump(tests))
    done = subprocess.run(
        ["promtool", "test", "rules", "test.yml"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_tried() -> None:
    assert {alert for alert, *_ in WRONG.values()} == NAMES


def test_nothing_fires_where_all_is_well(tmp_path: Path) -> None:
    ask(tmp_path, dict(WELL), [(".*", minute, 0) for minute in (1, 10, 60, 115)])


@pytest.mark.parametrize("case", WRONG)
def test_it_fires_when(case: str, tmp_path: Path) -> None:
    alert, series, before, after = WRONG[case]
    ask(tmp_path, WELL | series, [(alert, before, 0), (alert, after, 1), (".*", after, 1)])


def test_a_quarantined_job_is_news_for_an_hour(tmp_path: Path) -> None:
    series = WELL | {QUARANTINED: "_x20 1x100"}
    ask(tmp_path, series, [("ReltraceQuarantined", 70, 1), ("ReltraceQuarantined", 95, 0)])
