"""Tensors in a store: files that others can read, and manifests that say where."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from reltrace_proto.v1 import types_pb2
from reltrace_worker.session.store import LargeResults, StoreError, write
from reltrace_worker.types.errors import InvalidJob, PassFailedError
from reltrace_worker.types.results import SiteTensor
from safetensors import safe_open


def named(site: str, values: torch.Tensor, trace: int = 0, part: str = "") -> tuple:
    return SiteTensor(trace, site, part, values), values


def jobs(seed: int) -> list:
    torch.manual_seed(seed)
    first = [
        named("resid", torch.randn(3, 4)),
        named("neuron", torch.randn(2, 5).bfloat16(), trace=1),
    ]
    topk = [
        named("head", torch.randn(3, 2).half(), part="values"),
        named("head", torch.randint(9, (3, 2), dtype=torch.int32), part="token"),
    ]
    return [("s-0", first), ("s-1", topk)]


def test_a_file_is_read_by_the_safetensors_library(tmp_path: Path) -> None:
    given = jobs(1)
    write(tmp_path.as_uri(), "a.safetensors", given)
    names = ["s-0/0/resid", "s-0/1/neuron", "s-1/0/head/values", "s-1/0/head/token"]
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert sorted(file.keys()) == sorted(names)
        tensors = [values for _, tensors in given for _, values in tensors]
        for name, values in zip(names, tensors, strict=True):
            found = file.get_tensor(name)
            assert found.dtype == values.dtype
            assert torch.equal(found, values)


def test_a_manifest_names_the_bytes_of_its_job(tmp_path: Path) -> None:
    given = jobs(2)
    manifests = write(f"{tmp_path.as_uri()}/deeper/still", "b.safetensors", given)
    data = (tmp_path / "deeper/still/b.safetensors").read_bytes()
    for (_, tensors), manifest in zip(given, manifests, strict=True):
        assert manifest.url == f"{tmp_path.as_uri()}/deeper/still/b.safetensors"
        own = data[manifest.offset : manifest.offset + manifest.length]
        assert hashlib.sha256(own).digest() == manifest.sha256
        for (tensor, values), stored in zip(tensors, manifest.tensors, strict=True):
            assert (stored.trace, stored.site, stored.part) == (
                tensor.trace, tensor.site, tensor.part,
            )  # fmt: skip
            assert tuple(stored.shape) == tuple(values.shape)
            raw = values.contiguous().view(torch.uint8).numpy().tobytes()
            assert own[stored.offset : stored.offset + len(raw)] == raw
    assert manifests[1].tensors[1].dtype == types_pb2.SCALAR_TYPE_INT32
    # Aligned, so that it can be mapped.
    assert manifests[0].offset % 8 == 0


def test_a_store_that_does_not_take_it_fails_the_attempt(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(PassFailedError, match=r"file/a\.safetensors can not be written"):
        write(f"{tmp_path.as_uri()}/file", "a.safetensors", jobs(3))


PATTERNS = ("file:///srv/{tenant}", "s3://bucket/shared")


def test_the_folder_that_a_job_may_not_leave() -> None:
    large = LargeResults(outputs=PATTERNS)
    assert large.output_root("file:///srv/a/run", "a") == "file:///srv/a"
    assert large.output_root("s3://bucket/shared", "a") == "s3://bucket/shared"
    for uri in (
        "file:///srv/b/run",
        "file:///srv/a/../b",
        "file:///srv/a/shard-0.safetensors::file:///x",
        "simplecache::s3://bucket/shared/x",
        "s3://bucket/shared/x?a",
    ):
        with pytest.raises(InvalidJob, match=r"output_uri: .* is in no folder allowed here"):
            large.output_root(uri, "a")
    # A scheduler of an older version does not say which folders there are.
    assert LargeResults().output_root("file:///srv/b", "a") == "file:///srv/b"
    with pytest.raises(InvalidJob):
        LargeResults().output_root("file:///srv/b::file:///x", "a")


@pytest.mark.parametrize("kind", ["folder", "file", "dangling"])
def test_no_link_leads_out_of_a_folder(tmp_path: Path, kind: str) -> None:
    """
    Given a link in an allowed folder that leads to another tenant's
    I expect the attempt to fail, and nothing to be written there.
    """
    mine, others = tmp_path / "a", tmp_path / "b"
    mine.mkdir()
    others.mkdir()
    victim = others / "x.safetensors"
    victim.write_bytes(b"theirs")
    (mine / "run").symlink_to(others / "new" if kind == "dangling" else others)
    url, name = f"{mine.as_uri()}/run", "x.safetensors"
    if kind == "file":
        url, name = mine.as_uri(), "y.safetensors"
        (mine / name).symlink_to(victim)
    with pytest.raises(PassFailedError, match="a symbolic link leads out"):
        write(url, name, jobs(4), root=mine.as_uri())
    assert victim.read_bytes() == b"theirs"
    assert list(others.iterdir()) == [victim]
    write(mine.as_uri(), "z.safetensors", jobs(4), root=mine.as_uri())


def test_only_what_is_larger_is_stored() -> None:
    tensors = [named("resid", torch.zeros(10)), named("head", torch.zeros(10))]
    assert not LargeResults().takes(tensors)
    assert not LargeResults("file:///somewhere", 80).takes(tensors)
    assert LargeResults("file:///somewhere", 79).takes(tensors)


@pytest.mark.parametrize("url", ["nothing://there", "adl://account/folder"])
def test_a_store_that_can_not_be_reached_is_named(url: str) -> None:
    with pytest.raises(StoreError, match=f"larger than 5 bytes go to {url}: "):
        LargeResults(url, 5).check()


def test_numbers_of_an_empty_tensor(tmp_path: Path) -> None:
    (manifest,) = write(tmp_path.as_uri(), "c", [("s-0", [named("resid", torch.zeros(0, 4))])])
    assert manifest.length == 0
    assert manifest.sha256 == hashlib.sha256(b"").digest()
    np.testing.assert_array_equal(manifest.tensors[0].shape, [0, 4])
