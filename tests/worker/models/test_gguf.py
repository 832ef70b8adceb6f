"""GGUF files: every family and quantization, the same numbers as of the checkpoint's own files."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from reference.checkpoints import (
    GEMMA3,
    GROUPED,
    LLAMA3_ROPE,
    MISTRAL,
    QWEN2,
    QWEN3,
    TIED,
    Recipe,
    build_config,
    build_model,
)
from reference.gguf_files import as_stored, write_gguf
from reference.loaded import Checkpoints
from reltrace_worker.models import gguf as reading
from reltrace_worker.models import load_model
from reltrace_worker.models.gguf import GgufFile
from reltrace_worker.types.errors import ModelError
from transformers import PreTrainedModel

IDS = torch.arange(10, 74)[None]
# Rows of whole blocks; the embeddings of Gemma are more than a chunk.
WIDE = replace(GROUPED, hidden_size=64, intermediate_size=96, layers=2)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits  # type: ignore[no-any-return]


def as_llama_cpp_has_it(recipe: Recipe) -> PreTrainedModel:
    """The model of a recipe, with what GGUF files can not say as llama.cpp assumes it."""
    model = build_model(recipe)
    if recipe.family != "gemma3_text":
        return model
    config: Any = build_config(recipe)
    config.query_pre_attn_scalar = recipe.head_dim
    config.layer_types = ["sliding_attention"] * 5 + ["full_attention"] + ["sliding_attention"]
    changed = type(model)(config)
    changed.load_state_dict(model.state_dict())
    return changed.eval()


@pytest.mark.parametrize(
    "recipe",
    [
        GROUPED,
        TIED,
        MISTRAL,
        # Without windows, which GGUF files of Qwen do not have.
        replace(QWEN2, sliding_window=None),
        replace(QWEN3, sliding_window=None),
        replace(GEMMA3, layers=7),
    ],
    ids=lambda recipe: recipe.family,
)
def test_a_file_in_float32_is_the_checkpoint(tmp_path: Path, recipe: Recipe) -> None:
    """
    Given a model, and a GGUF file of it in float32
    I expect the same class, weights and logits, and a model that does not count as quantized.
    """
    wanted: Any = as_llama_cpp_has_it(recipe)
    loaded = load_model(str(write_gguf(tmp_path / "a.gguf", recipe)), device="cpu")
    assert type(loaded.model) is type(wanted)
    ours, theirs = loaded.model.state_dict(), wanted.state_dict()
    assert ours.keys() == theirs.keys()
    for key, weight in theirs.items():
        # One is added to Gemma's norms and taken away again.
        exact = not (recipe.family == "gemma3_text" and key.endswith("norm.weight"))
        torch.testing.assert_close(ours[key], weight, rtol=0, atol=0.0 if exact else 1e-7)
    torch.testing.assert_close(logits(loaded.model), logits(wanted), rtol=0, atol=1e-4)
    config: Any = loaded.model.config
    assert config.rms_norm_eps == wanted.config.rms_norm_eps
    assert getattr(config, "quantization_config", None) is None
    assert not getattr(loaded.model, "is_quantized", False)
    assert loaded.context_length == recipe.context_length


def test_name_and_revision_are_those_of_the_file(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "Tiny.Q8_0.gguf", WIDE)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    loaded = load_model(str(path))
    assert (loaded.name, loaded.revision) == ("Tiny.Q8_0", f"sha256:{digest[:12]}")
    assert load_model(str(path), revision=f"sha256:{digest}").revision == loaded.revision
    with pytest.raises(ModelError, match=rf"is sha256:{digest}, not sha256:00000000: another file"):
        load_model(str(path), revision="sha256:00000000")
    with pytest.raises(ModelError, match="reads sha256: and 8 to 64 hex digits, not 'main'"):
        load_model(str(path), revision="main")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_quantized_weights_are_what_they_stand_for(tmp_path: Path, kind: str, dtype: str) -> None:
    quantization = GGMLQuantizationType[kind]
    loaded = load_model(str(write_gguf(tmp_path / "a.gguf", WIDE, quantization)), dtype=dtype)
    assert {p.dtype for p in loaded.model.parameters()} == {getattr(torch, dtype)}
    plain = load_model(str(write_gguf(tmp_path / "b.gguf", WIDE)))
    originals = plain.model.state_dict()
    for name, weight in loaded.model.state_dict().items():
        stored = as_stored(name, originals[name], WIDE).numpy()
        if stored.ndim > 1:
            stored = gguf.dequantize(gguf.quantize(stored, quantization), quantization)
        ours = as_stored(name, weight, WIDE)
        assert torch.equal(ours, torch.from_numpy(stored.copy()).to(ours.dtype)), name


KINDS = sorted(kind.name for kind in gguf.quants._type_traits)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_block_is_read_in_parts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str
) -> None:
    """
    Given a tensor of blocks of any bits
    If it is read in parts that do not divide it
    I expect the values that gguf gives for the whole.
    """
    quantization = GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[quantization]
    columns = 2 * max(block, 8)
    rng = np.random.default_rng(0)
    # Of the exponents of scales, none that stands for infinity.
    rows = rng.integers(0, 0x40, (7, columns // block * size), np.uint8)
    path = tmp_path / "a.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_tensor("blk.3.ffn_down.weight", rows, raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    monkeypatch.setattr(reading, "_CHUNK", 3 * columns)
    monkeypatch.setattr(GgufFile, "_setting", lambda *_: 1)
    weights = GgufFile(path).weights(torch.float32)
    wanted = torch.from_numpy(gguf.dequantize(rows, quantization))
    ours = weights["model.layers.3.mlp.down_proj.weight"][...]
    assert ours.shape == (7, columns)
    assert torch.equal(ours, wanted)
    assert ours.abs().max() > 0


def test_frequencies_of_llama_3_are_divided_by_the_factors_in_the_file(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    wanted: Any = checkpoints.loaded("llama3_rope").model
    rotary = wanted.model.rotary_emb
    dim = LLAMA3_ROPE.hidden_size // LLAMA3_ROPE.heads
    unscaled = 1 / 500.0 ** (torch.arange(0, dim, 2).float() / dim)
    factors = (unscaled / rotary.inv_freq).numpy()
    assert factors.max() == pytest.approx(8)
    path = write_gguf(
        tmp_path / "a.gguf",
        LLAMA3_ROPE,
        change=lambda writer: writer.add_tensor("rope_freqs.weight", factors),
    )
    torch.testing.assert_close(
        logits(load_model(str(path)).model), logits(wanted), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize(
    ("scaling", "original", "context"),
    [("linear", None, 512), ("yarn", 32, 128), ("yarn", None, 512)],
)
def test_scaled_rotations(tmp_path: Path, scaling: str, original: int | None, context: int) -> None:
    def change(writer: GGUFWriter) -> None:
        writer.add_string("llama.rope.scaling.type", scaling)
        writer.add_rope_scaling_factor(4.0)
        if original is not None:
            writer.add_rope_scaling_orig_ctx_len(original)

    loaded = load_model(str(write_gguf(tmp_path / "a.gguf", WIDE, change=change)))
    assert loaded.context_length == context
    rope = loaded.model.config.rope_parameters
    assert (rope["rope_type"], rope["factor"]) == (scaling, 4.0)


def string(key: str, value: str) -> Callable[[GGUFWriter], None]:
    return lambda writer: writer.add_string(key, value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.add_expert_count(8), "of architecture 'llama' with experts; supported GGUF"),
        (lambda w: w.add_uint16("split.count", 3), "is one of 3 parts; put them together"),
        (lambda w: w.add_rope_dimension_count(8), "rotates 8 of 16 dimensions of a head"),
        (string("llama.rope.scaling.type", "longrope"), "by 'longrope'; supported: linear, yarn"),
        (
            lambda w: w.add_tensor("blk.0.more.weight", np.ones(3, np.float32)),
            "no place for: blk.0.more.weight",
        ),
    ],
)
def test_what_is_not_supported_is_named(
    tmp_path: Path, change: Callable[[GGUFWriter], None], message: str
) -> None:
    path = write_gguf(tmp_path / "a.gguf", WIDE, change=change)
    with pytest.raises(ModelError, match=message):
        load_model(str(path))


def test_a_weight_that_is_missing_is_named(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    path = write_gguf(tmp_path / "a.gguf", WIDE, leave_out=[name])
    with pytest.raises(ModelError, match=f"lacks weights that its architecture has: {name}"):
        load_model(str(path))


def test_another_architecture_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    writer = GGUFWriter(path, "phi3")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ModelError, match="'phi3'; supported GGUF files: llama, qwen2, qwen3, gemm"):
        load_model(str(path))


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    """
    Given a file that was cut anywhere, is empty, or is something else
    I expect one error that names it.
    """
    whole = write_gguf(tmp_path / "a.gguf", WIDE).read_bytes()
    path = tmp_path / "b.gguf"
    for size in [0, 3, 10, 40, *range(100, len(whole), len(whole) // 7), len(whole) - 40]:
        path.write_bytes(whole[:size])
        with pytest.raises(ModelError, match=r"b\.gguf can not be read as GGUF: "):
            load_model(str(path))
    path.write_bytes(b"x" * 500)
    with pytest.raises(ModelError, match="it does not begin with the letters GGUF"):
        load_model(str(path))
    path.write_bytes(b"GGUF" + (7).to_bytes(4, "little") + whole[8:])
    with pytest.raises(ModelError, match="its version is 7; supported: 2, 3"):
        load_model(str(path))


def test_without_the_package_it_is_said_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = write_gguf(tmp_path / "a.gguf", WIDE)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModelError, match="needs the package gguf: pip install gguf"):
        load_model(str(path))


def test_what_excludes_a_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"there is no file '.*missing\.gguf'"):
        load_model(str(tmp_path / "missing.gguf"))
