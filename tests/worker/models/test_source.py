"""Where a model comes from: hub ids stand for commits, and folders for files that are all used."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import pytest
import structlog
import torch
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RevisionNotFoundError,
)
from reference.loaded import Checkpoints
from reltrace_worker.models import load_model, source
from reltrace_worker.types.errors import ModelError
from safetensors.torch import load_file, save_file
from structlog.testing import capture_logs

FIRST, SECOND = "1" * 40, "2" * 40


@pytest.fixture(autouse=True)
def default_logs() -> Iterator[None]:
    structlog.reset_defaults()
    yield
    structlog.reset_defaults()


@pytest.fixture
def folder(checkpoints: Checkpoints, tmp_path: Path) -> Path:
    """A copy of a good checkpoint."""
    return Path(shutil.copytree(checkpoints.folder("plain"), tmp_path / "copy"))


@pytest.fixture
def hub(checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of a hub that can not be reached: acme/tiny, with two commits."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--acme--tiny"
    for commit, name in ((FIRST, "plain"), (SECOND, "grouped")):
        shutil.copytree(checkpoints.folder(name), repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(FIRST)
    (repository / "refs" / "v2").write_text(SECOND)
    return repository


def test_the_revision_of_a_hub_model_is_a_commit(hub: Path) -> None:
    """
    Given a hub id, and a branch that moves to another commit
    I expect the commit as revision each time, so that what was computed before is known as such.
    """
    loaded = load_model("acme/tiny")
    assert (loaded.name, loaded.revision, loaded.shape.layers) == ("acme/tiny", FIRST, 3)
    assert load_model("acme/tiny", revision="v2").revision == SECOND
    assert load_model("acme/tiny", revision=FIRST).revision == FIRST
    (hub / "refs" / "main").write_text(SECOND)
    loaded = load_model("acme/tiny")
    assert (loaded.revision, loaded.shape.layers) == (SECOND, 4)


def test_what_is_not_in_the_cache_is_named(hub: Path) -> None:
    with pytest.raises(ModelError, match=r"no folder 'nobody/x', and as a hub id it can not be"):
        load_model("nobody/x")
    with pytest.raises(ModelError, match=r"as a hub id at 'v3' it can not be loaded: .*OFFLINE"):
        load_model("acme/tiny", revision="v3")
    # A download that was interrupted.
    (hub / "snapshots" / FIRST / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model\.safetensors .* is missing in .*1111"):
        load_model("acme/tiny")


@pytest.mark.parametrize("error", [GatedRepoError, RevisionNotFoundError, HfHubHTTPError, OSError])
def test_what_the_hub_refuses_is_one_line(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def refuse(*_: object, **__: object) -> str:
        request = httpx2.Request("GET", "https://huggingface.co")
        response = httpx2.Response(403, request=request)
        is_of_hub = issubclass(error, HfHubHTTPError)
        raise error("it is gated\nsee", **({"response": response} if is_of_hub else {}))

    monkeypatch.setattr(source, "snapshot_download", refuse)
    message = "no folder 'a/b', and as a hub id at 'v9' it can not be loaded: it is gated see"
    with pytest.raises(ModelError, match=message):
        load_model("a/b", revision="v9")


def test_only_the_weights_that_are_read_are_downloaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Not those of a second format, and at the commit that the first call found."""
    asked = []

    def download(_: str, *, revision: str | None, allow_patterns: list[str], **__: object) -> str:
        asked.append((revision, allow_patterns))
        folder = tmp_path / FIRST
        folder.mkdir(exist_ok=True)
        weights = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
        index = folder / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": weights}))
        return str(folder)

    monkeypatch.setattr(source, "snapshot_download", download)
    assert source.find_source("a/b", "v1").commit == FIRST
    (first, small), (second, weights) = asked
    assert (first, second) == ("v1", FIRST)
    assert not any("safetensors" in pattern for pattern in small)
    assert weights == ["model-1.safetensors", "model-2.safetensors", "model.safetensors"]


def adapter(folder: Path) -> None:
    settings = {"peft_type": "LORA", "base_model_name_or_path": "acme/base"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file({"lora_A": torch.ones(2)}, folder / "adapter_model.safetensors")


@pytest.mark.parametrize("weights", [True, False])
def test_an_adapter_is_refused_and_names_its_base_model(folder: Path, weights: bool) -> None:
    adapter(folder)
    if not weights:
        (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"holds an adapter .* of the base model 'acme/base'"):
        load_model(str(folder))


def test_two_sets_of_weights_are_a_question(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file(weights, folder / "model-00001-of-00001.safetensors", metadata={"format": "pt"})
    names = dict.fromkeys(weights, "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        ModelError, match=r"two sets of weights, model\.safetensors and model-00001"
    ):
        load_model(str(folder))
    (folder / "model.safetensors").unlink()
    load_model(str(folder))


def touch(*names: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for name in names:
            (folder / name).write_bytes(b"weights")

    return change


@pytest.mark.parametrize(
    ("change", "files"),
    [
        (touch("pytorch_model.bin"), ["pytorch_model.bin"]),
        (touch("consolidated.safetensors"), ["consolidated.safetensors"]),
        (touch("consolidated.00.pth", "model.Q4.gguf"), ["consolidated.00.pth", "model.Q4.gguf"]),
        (touch("training_args.bin", "optimizer.pt", "rng_state.pth", "notes.txt"), None),
        (touch(), None),
    ],
)
def test_weights_that_are_not_used_are_named(
    folder: Path, change: Callable[[Path], None], files: list[str] | None
) -> None:
    change(folder)
    with capture_logs() as logs:
        load_model(str(folder))
    told = [line["files"] for line in logs if line["event"] == "model.files_not_used"]
    assert told == ([] if files is None else [files])


def test_what_is_not_used_is_no_part_of_the_revision(folder: Path) -> None:
    before = load_model(str(folder)).revision
    touch("consolidated.safetensors")(folder)
    assert load_model(str(folder)).revision == before
    # A chat template is used: prompts are made by it.
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert load_model(str(folder)).revision != before


def test_the_ending_of_a_gguf_file_may_be_in_capitals(tmp_path: Path) -> None:
    path = tmp_path / "Tiny.Q4_0.GGUF"
    with pytest.raises(ModelError, match=r"there is no file .*Tiny\.Q4_0\.GGUF"):
        source.find_source(str(path), None)
    path.touch()
    assert source.find_source(str(path), None) == source.Source(path, "Tiny.Q4_0")


def test_a_folder_of_gguf_files_names_one(tmp_path: Path) -> None:
    touch("b.gguf", "a.gguf")(tmp_path)
    with pytest.raises(ModelError, match=r"GGUF files: give the path of one, such as a\.gguf"):
        load_model(str(tmp_path))
