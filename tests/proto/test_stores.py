"""Which URLs of stores are let through."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from reltrace_proto.stores import is_below, leaves_by_link, url_fault

FOLDERS = ("s3://bucket/runs", "file:///srv/traces", "file:///home/me/a #1/100%")


@pytest.mark.parametrize(
    "url",
    [
        "s3://bucket/runs",
        "s3://bucket/runs/a/b",
        "s3://bucket/runs/2026-01-31T12:00 first=1,b_c~d.e@f",
        "file:///srv/traces/x/shard-000001.safetensors",
        "file:///home/me/a #1/100%/x",
        "file:///srv/traces/\u00fc",
    ],
)
def test_a_folder_and_what_is_in_it(url: str) -> None:
    assert is_below(url, FOLDERS)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "s3://bucket",
        "s3://bucket/runs-of-others",
        "S3://bucket/runs/a",
        "s3://me@bucket/runs/a",
        "s3://bucket/runs/../secrets",
        "s3://bucket/runs/..",
        "s3://bucket/runs/./a",
        "s3://bucket/runs//a",
        "s3://bucket/runs/",
        "s3://bucket/runs/a/",
        "s3://bucket/runs/a?versionId=1",
        "s3://bucket/runs/a#1",
        "s3://bucket/runs/%2e%2e/a",
        "s3://bucket/runs/a\\..\\b",
        "s3://bucket/runs/a\n",
        "s3://bucket/runs/a\0b",
        "s3://bucket/runs/a\u202eb",
        "s3://bucket/runs/*",
        "s3://bucket/runs/[ab]",
        "file:///srv/traces/tenant-b/shard-0.safetensors::file:///x",
        "file:///srv/traces/::file:///x",
        "simplecache::s3://bucket/runs/a",
        "http://169.254.169.254/s3://bucket/runs",
        "/srv/traces/a",
        "file:/srv/traces/a",
    ],
)
def test_what_is_elsewhere_or_not_plain(url: str) -> None:
    assert not is_below(url, FOLDERS)


@given(st.text(max_size=30))
def test_nothing_gets_out(rest: str) -> None:
    """Whatever follows a folder, fsspec opens what is in that folder, or it is not let through."""
    from fsspec.core import url_to_fs

    url = f"file:///srv/traces/{rest}"
    if is_below(url, FOLDERS):
        fs, path = url_to_fs(f"{url}/name")
        assert fs.protocol == ("file", "local")
        assert path == f"/srv/traces/{rest}/name"


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("/srv/results", "must be a URL"),
        ("file://srv/results", "must be a URL"),
        ("file:///", "must be a URL"),
        ("S3://bucket", "must be a URL"),
        ("s3:///x", "must be a URL"),
        ("simplecache::s3://bucket/x", "must be a URL"),
        ("s3://bucket/x::file:///y", "one plain URL"),
        ("s3://bucket/a\nb", "one plain URL"),
        ("s3://bucket/../x", "no . and .."),
        ("s3://bucket/x", ""),
        ("file:///srv/a b #1/{tenant}", ""),
    ],
)
def test_what_is_no_folder(url: str, said: str) -> None:
    assert said in url_fault(url)
    assert bool(url_fault(url)) == bool(said)


def test_a_link_out_of_a_folder(tmp_path: Path) -> None:
    root, inside = tmp_path / "root", tmp_path / "root" / "a"
    inside.mkdir(parents=True)
    (tmp_path / "secret").write_text("x")
    (root / "out").symlink_to(tmp_path)
    (root / "in").symlink_to(inside)
    (inside / "file").symlink_to(tmp_path / "secret")
    (tmp_path / "alias").symlink_to(root)
    folder = f"file://{root}"
    assert leaves_by_link(f"{folder}/out/x", folder)
    assert leaves_by_link(f"{folder}/a/file", folder)
    assert not leaves_by_link(f"{folder}/in/x", folder)
    assert not leaves_by_link(f"{folder}/a/new/x", folder)
    # A folder that is a link itself is what the operator named.
    assert not leaves_by_link(f"file://{tmp_path}/alias/a/x", f"file://{tmp_path}/alias")
    assert not leaves_by_link("s3://bucket/x", "s3://bucket")
