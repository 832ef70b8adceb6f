"""The simulated fleet runs, at a size of seconds, and its figures are those of what was done."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from bench.fleet_clients import Tally
from bench.fleet_meter import Reading, per_job, per_second, spread
from reltrace_proto.v1 import types_pb2

SCRIPT = Path(__file__).parent / "fleet.py"


def test_a_small_fleet_answers_every_job_once_and_gives_its_figures() -> None:
    command = [
        sys.executable, str(SCRIPT), "--workers", "6", "--worker-processes", "2",
        "--schedulers", "2", "--jobs", "300", "--batch", "25", "--in-flight", "100",
        "--idle-seconds", "1", "--pass-seconds", "0.05", "--pass-jobs", "4", "--deadline", "60",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)

    # Workers on machines of their own: a connection each.
    assert report["connect"]["tcp_connections"] == 6
    assert report["connections_made"] == 6
    assert report["leases_revoked"] == 0
    idle = report["idle"]
    assert idle["redis"]["commands_per_second"] > 0
    # A heartbeat comes every ten seconds.
    assert 0 <= idle["heartbeats_per_second"] <= 6

    for scene in (report["throughput"], report["paced"]):
        assert scene["jobs"] == 300
        assert scene["lost"] == scene["doubled"] == 0
        assert set(scene["cpu_microseconds_per_job"]) == {
            "redis", "scheduler_0", "scheduler_1", "workers",
        }  # fmt: skip
        assert scene["redis"]["commands_per_job"] > 1
        # Every result goes through Redis: in, and out again.
        assert scene["redis"]["bytes_in_per_job"] > scene["result_bytes_per_job"] > 64
        assert scene["redis"]["bytes_out_per_job"] > scene["result_bytes_per_job"]
        assert "evalsha" in scene["redis"]["top_commands_per_job"]
        share = scene["all"]["jobs_per_worker"]
        assert share["least"] <= 300 / 6 <= share["most"]

    paced = report["paced"]["all"]
    # Six engines that take four jobs in a twentieth of a second.
    assert 0 < paced["percent_of_capacity"] <= 100
    assert paced["jobs_per_pass"] <= 4
    assert 0 <= paced["idle_percent"]["least"] <= paced["idle_percent"]["most"] <= 100


def test_a_fleet_that_reaches_its_deadline_says_so() -> None:
    command = [
        sys.executable, str(SCRIPT), "--workers", "2", "--worker-processes", "1",
        "--schedulers", "1", "--clients", "1", "--jobs", "200", "--scenes", "paced",
        "--pass-seconds", "1", "--pass-jobs", "1", "--deadline", "6",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert "deadline" in done.stderr
    assert not done.stdout


@pytest.mark.parametrize(
    ("values", "jain", "variation"),
    [([3, 3, 3, 3], 1.0, 0.0), ([4, 0, 0, 0], 0.25, 1.732), ([0, 0], 1.0, 0.0)],
)
def test_jains_index_falls_from_one_to_one_over_the_workers(
    values: list[float], jain: float, variation: float
) -> None:
    assert spread(values)["jain"] == jain
    assert spread(values)["coefficient_of_variation"] == variation


def reading(at: float, cpu: float, calls: int) -> Reading:
    return Reading(
        at=at,
        cpu={"redis": cpu},
        rss={"redis": 1},
        commands=calls,
        bytes_in=10 * calls,
        bytes_out=20 * calls,
        memory_peak=1 << 20,
        calls={"get": calls},
        microseconds={"get": 5 * calls},
    )


def test_costs_are_differences_of_readings() -> None:
    before, after = reading(100.0, 1.0, 1000), reading(104.0, 3.0, 3000)
    costs = per_job(before, after, 500)
    assert costs["cpu_microseconds_per_job"] == {"redis": 4000.0}
    assert costs["cpu_percent_of_a_core"] == {"redis": 50.0}
    assert costs["redis"]["commands_per_job"] == 4.0
    assert costs["redis"]["bytes_in_per_job"] == 40
    assert costs["redis"]["top_commands_per_job"] == {"get": {"calls": 4.0, "microseconds": 20.0}}
    assert per_second(before, after)["redis"]["commands_per_second"] == 500


def test_a_result_that_comes_twice_and_one_that_never_comes_are_counted(
    capsys: pytest.CaptureFixture[str],
) -> None:
    tally = Tally(jobs=3)
    tally.accept(["s-0", "s-1", "s-2"])
    for job_id in ("s-0", "s-1", "s-1"):
        chunk = types_pb2.ResultChunk(job_id=job_id)
        chunk.end.state = types_pb2.JOB_STATE_SUCCEEDED
        tally.answer(chunk)
    figures = tally.figures()
    assert (figures["answered"], figures["lost"], figures["doubled"]) == (2, 1, 1)
    assert json.loads(capsys.readouterr().out.splitlines()[0]) == {"event": "submitted"}
    with pytest.raises(RuntimeError, match="twice"):
        tally.accept(["s-2"])
