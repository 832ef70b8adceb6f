"""Large results in a store: who may write where, and what is deleted."""

import os
from pathlib import Path

import pytest
from redis.asyncio import Redis
from reltrace_scheduler.api.result_store import Sweeper, check_url, is_inside
from reltrace_scheduler.config import Settings
from reltrace_scheduler.errors import StartError
from reltrace_scheduler.queue.store import Store
from reltrace_scheduler.records import NewJob


@pytest.mark.parametrize(
    ("uri", "inside"),
    [
        ("s3://bucket/runs", True),
        ("s3://bucket/runs/a/b", True),
        ("s3://bucket/runs-of-others", False),
        ("s3://bucket/runs/../secrets", False),
        ("s3://bucket", False),
        ("file:///srv/x", True),
        ("file:///etc", False),
        ("", False),
    ],
)
def test_only_allowed_folders_and_what_is_in_them(uri: str, inside: bool) -> None:
    assert is_inside(uri, ["s3://bucket/runs", "file:///srv"]) is inside


@pytest.mark.parametrize(
    ("url", "said"), [("/srv/results", "must be a URL"), ("nothing://x", "nothing")]
)
def test_a_folder_that_can_not_be_one(url: str, said: str) -> None:
    with pytest.raises(StartError, match=f"--results-url {url}: .*{said}"):
        check_url("--results-url", url)


async def test_results_of_jobs_that_are_gone_are_deleted(
    store: Redis, tmp_path: Path, settings: Settings
) -> None:
    """
    Given files of a job that is queued, of one that is gone, of one that is being written, and a
    stranger's
    If the folder is swept
    I expect only that of the job that is gone to be deleted.
    """
    queue = Store(store, settings)
    submission = await queue.queue.submit([NewJob("m", b"spec")], tenant="t")
    (queued,) = submission.job_ids
    old = ["gone-0.1.safetensors", f"{queued}.2.safetensors", "notes.txt", "gone.safetensors"]
    for name in [*old, "gone-1.1.safetensors"]:
        (tmp_path / name).write_bytes(b"x")
    for name in old:
        os.utime(tmp_path / name, (1_700_000_000, 1_700_000_000))
    assert await Sweeper(tmp_path.as_uri(), queue).sweep() == 1
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {*old[1:], "gone-1.1.safetensors"}


async def test_a_folder_that_is_not_there_yet(
    store: Redis, tmp_path: Path, settings: Settings
) -> None:
    assert await Sweeper((tmp_path / "later").as_uri(), Store(store, settings)).sweep() == 0
