"""The dashboard and the alerts over a running stack, read by a real Prometheus."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
import reltrace
from deploy.drawing import draw
from deploy.panels import Panel, Series, Span, load
from deploy.stack import SCRAPE, TENANTS, Stack, need_prometheus, running
from deploy.test_monitoring import ALERTS
from matplotlib.text import Text
from reltrace_proto.v1 import trace_pb2, trace_pb2_grpc, types_pb2
from waiting import wait_until

pytestmark = pytest.mark.slow

PROMPT = "I have {} cats and 3 dogs. My cats love to play with my"
JOBS = {"team-a": 40, "team-b": 60}
PANELS = load()


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    need_prometheus()
    with running(tmp_path_factory.mktemp("stack")) as made:
        yield made


def run_jobs(stack: Stack) -> int:
    """Have jobs of both tenants succeed, and one fail; return the tokens of those that ran."""
    tokens = 0
    for tenant, priority in zip(TENANTS, ("interactive", "batch"), strict=True):
        with stack.client(tenant) as client:
            prompts = [PROMPT.format(number) for number in range(JOBS[tenant])]
            for trace in client.trace_many(prompts, priority=priority, timeout=60):
                assert isinstance(trace, reltrace.Trace), trace
                tokens += len(trace.tokens)
    with stack.client("team-a") as client, pytest.raises(reltrace.TraceError, match="one token"):
        client.trace(PROMPT, target="not one token", timeout=60)
    return tokens


def submit(stack: Stack, tenant: str) -> str:
    """Submit a job without waiting for it; return its id."""
    token = stack.tokens[tenant].read_text().strip()
    with grpc.insecure_channel(stack.schedulers[0]) as channel:
        answer = trace_pb2_grpc.TraceServiceStub(channel).SubmitJobs(
            trace_pb2.SubmitJobsRequest(jobs=[types_pb2.JobSpec(prompt=PROMPT)]),
            timeout=10,
            metadata=[("authorization", f"Bearer {token}")],
        )
    return str(answer.job_ids[0])


def submit_to_a_stopped_worker(stack: Stack, client: reltrace.Client, tenant: str) -> str:
    """Stop the worker where it is, and wait until a job is leased to it."""
    os.kill(stack.worker.popen.pid, signal.SIGSTOP)
    job = submit(stack, tenant)
    wait_until(lambda: client.jobs(job)[0].state == "leased", "the job is leased", seconds=10)
    return job


def shown(stack: Stack, since: float) -> dict[str, list[Series]]:
    span = Span(since, time.time(), SCRAPE)
    return {panel.title: stack.prometheus.series(panel, span) for panel in PANELS if panel.queries}


def last(series: list[Series], name: str = "") -> float:
    (found,) = [one for one in series if one.name == name]
    return found.values[-1]


def test_every_panel_shows_what_happened(stack: Stack, tmp_path: Path) -> None:
    """
    Given jobs of two tenants that succeed, some that fail, and one that is cancelled
    I expect every panel to show numbers, those numbers to be right, and no alert.
    """
    since, prometheus = time.time(), stack.prometheus
    tokens = run_jobs(stack)
    # Rates begin with the second number that Prometheus reads of a series.
    succeeded = 'sum(reltrace_jobs_ended_total{state="succeeded"})'
    count = sum(JOBS.values())
    at_worker = 'sum(reltrace_worker_jobs_total{outcome="succeeded"})'
    wait_until(lambda: prometheus.value(succeeded) == count, "schedulers count the first jobs")
    wait_until(lambda: prometheus.value(at_worker) == count, "the worker counts them")
    tokens += run_jobs(stack)
    wait_until(lambda: prometheus.value(at_worker) == 2 * count, "the worker counts the others")
    assert prometheus.value("sum(reltrace_worker_tokens_total)") == tokens
    with stack.client("team-a") as client:
        cancelled = submit_to_a_stopped_worker(stack, client, "team-a")
        assert client.cancel(cancelled) == 1
        os.kill(stack.worker.popen.pid, signal.SIGCONT)
    wait_until(
        lambda: prometheus.value('max(reltrace_cluster_jobs_ended_total{state="cancelled"})') == 1,
        "the cancelled job is counted",
    )
    with stack.client("team-a") as client:

        def has_numbers(panel: Panel) -> bool:
            # Every scheduler counts for itself: a rate of calls takes calls that go on.
            client.models()
            return bool(prometheus.series(panel, Span(since, time.time(), SCRAPE)))

        for panel in PANELS:
            if panel.queries:
                wait_until(lambda panel=panel: has_numbers(panel), f"numbers in {panel.title}")
    found = shown(stack, since)
    for expression, wanted in {
        succeeded: 2 * count,
        'max(reltrace_cluster_jobs_ended_total{state="succeeded"})': 2 * count,
        'max(reltrace_cluster_jobs_ended_total{state="failed"})': 2,
        'sum(reltrace_jobs_submitted_total{tenant="team-a"})': 2 * JOBS["team-a"] + 2 + 1,
        'sum(reltrace_jobs_submitted_total{tenant="team-b",priority="batch"})': 2 * JOBS["team-b"],
        "max(reltrace_leased_jobs) or vector(0)": 0,
        "sum(up)": 3,
    }.items():
        # A gauge may be of the moment before the last job ended, until the next scrape.
        wait_until(
            lambda expression=expression, wanted=wanted: prometheus.value(expression) == wanted,
            f"{expression} is {wanted}",
        )
    assert last(found["Workers"]) == 1
    assert last(found["Jobs that wait"]) == last(found["Oldest waits for"]) == 0
    assert last(found["Failed in 5 minutes"]) == last(found["Trouble"], "jobs failed") == 2
    assert {one.name: max(one.values) for one in found["Trouble"]} == {
        "leases lost": 0, "attempts failed": 0, "jobs failed": 2, "jobs quarantined": 0,
    }  # fmt: skip
    for title in ("Workers that a tenant keeps busy", "Worker time by tenant"):
        assert {one.name: max(one.values) > 0 for one in found[title]} == dict.fromkeys(
            TENANTS, True
        )
    assert {one.name for one in found["Jobs that are accepted"]} == {
        "team-a interactive", "team-b batch",
    }  # fmt: skip
    for title in ("Workers at work", "How full passes are"):
        (only,) = found[title]
        assert 0 < max(only.values) < 1.1, title
    # Idle time included: not more than the worker was there for.
    assert (
        0 < last(found["Worker time/1,000 jobs"]) <= 2 * 1000 * (time.time() - since) / (2 * count)
    )

    assert prometheus.alerts() == {}
    (group,) = prometheus.get("rules")["groups"]
    assert {rule["name"]: rule["health"] for rule in group["rules"]} == dict.fromkeys(ALERTS, "ok")

    figure = draw(
        PANELS, [found.get(panel.title, []) for panel in PANELS], Span(since, time.time(), SCRAPE)
    )
    texts = {text.get_text() for text in figure.findobj(Text)}
    assert {panel.title for panel in PANELS} <= texts
    assert "No data" not in texts
    figure.savefig(tmp_path / "dashboard.png")
    assert (tmp_path / "dashboard.png").read_bytes().startswith(b"\x89PNG")


def test_a_worker_that_dies_with_a_job_is_seen(stack: Stack) -> None:
    """
    Given a worker that is killed while it holds a job, at the first loss of which jobs are set
    aside, and another job that waits
    I expect one alert at once, the other to be on its way, and both jobs on the dashboard.
    """
    since, prometheus = time.time(), stack.prometheus
    with stack.client("team-b") as client:
        submit_to_a_stopped_worker(stack, client, "team-b")
    stack.worker.kill()
    submit(stack, "team-b")
    wait_until(
        lambda: (
            prometheus.alerts() == {"ReltraceNoWorker": "pending", "ReltraceQuarantined": "firing"}
        ),
        "alerts",
    )
    at_a_glance = {"Alerts": 1.0, "Workers": 0.0, "Jobs that wait": 1.0}

    def told() -> dict[str, float]:
        found = shown(stack, since)
        return {title: last(found[title]) for title in at_a_glance}

    # Its newest point is up to a second old.
    wait_until(lambda: told() == at_a_glance, "the dashboard says so too")
    found = shown(stack, since)
    assert last(found["Jobs that wait, by tenant"], "team-b") == 1
    assert last(found["Oldest waits for"]) > 0
    assert last(found["Trouble"], "jobs quarantined") == 1
    assert last(found["Trouble"], "leases lost") == pytest.approx(1, rel=0.5)
