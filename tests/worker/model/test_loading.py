"""Loading: what is supported loads, everything else says what is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from reference.loaded import Checkpoints, prepare, run
from reltrace_worker.engine import Engine
from reltrace_worker.errors import ModelError
from reltrace_worker.jobs import JobSpec
from reltrace_worker.model import load_model
from safetensors.torch import load_file, save_file


@pytest.fixture
def folder(checkpoints: Checkpoints, tmp_path: Path) -> Path:
    """A copy of a good checkpoint, to be damaged."""
    return Path(shutil.copytree(checkpoints.folder("plain"), tmp_path / "copy"))


def set_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_loaded_model_describes_itself(checkpoints: Checkpoints) -> None:
    loaded = load_model(str(checkpoints.folder("tied")), device="cpu")
    about = loaded.describe()
    assert (about.name, about.architecture) == ("tied", "LlamaForCausalLM")
    assert (about.layers, about.hidden_size, about.heads) == (3, 48, 4)
    assert (about.intermediate_size, about.vocab_size, about.context_length) == (80, 320, 128)
    # The head shares the embeddings and counts once.
    layer = 4 * 48 * 48 + 3 * 48 * 80 + 2 * 48
    assert about.parameters == 320 * 48 + 3 * layer + 48
    assert (about.dtype, about.device) == ("float32", "cpu")
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


def test_a_model_can_be_served_under_another_name(checkpoints: Checkpoints) -> None:
    assert load_model(str(checkpoints.folder("plain")), name="mine").name == "mine"


def test_the_revision_is_the_content(checkpoints: Checkpoints, folder: Path) -> None:
    original = load_model(str(checkpoints.folder("plain"))).revision
    assert original.startswith("sha256:")
    assert len(original) == len("sha256:") + 12
    assert load_model(str(folder)).revision == original
    (folder / "README.md").write_text("A note changes nothing.")
    assert load_model(str(folder)).revision == original
    change_weights(folder, lambda w: w["model.norm.weight"].add_(1e-3))
    assert load_model(str(folder)).revision != original


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_stored_as_float16_loads_in_a_supported_dtype(
    folder: Path, dtype: str
) -> None:
    change_weights(folder, lambda w: w.update({name: t.half() for name, t in w.items()}))
    set_config(folder, dtype="float16")
    loaded = load_model(str(folder), dtype=dtype)
    assert {p.dtype for p in loaded.model.parameters()} == {getattr(torch, dtype)}
    assert loaded.dtype == getattr(torch, dtype)
    run(Engine(loaded), prepare(loaded, JobSpec("A cat")))


@pytest.mark.parametrize(("dtype", "kind"), [(torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3")])
def test_weights_that_are_quantized_without_a_word_are_refused(
    folder: Path, dtype: torch.dtype, kind: str
) -> None:
    """Nothing in the config says so, and transformers would take the numbers as they stand."""
    name = "model.layers.1.mlp.down_proj.weight"
    change_weights(folder, lambda w: w.update({name: (w[name] * 10).to(dtype)}))
    with pytest.raises(ModelError, match=f"{name} in model.safetensors is of type {kind}; support"):
        load_model(str(folder))


def test_a_single_file_is_taken_before_an_index(folder: Path) -> None:
    """As transformers takes it; what the index names need not be there."""
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "gone.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert load_model(str(folder)).shape.layers == 3
    (folder / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ModelError, match="copy can not be loaded: Error"):
        load_model(str(folder))


def test_a_sharded_checkpoint_loads_and_a_missing_shard_is_named(
    checkpoints: Checkpoints, folder: Path
) -> None:
    (folder / "model.safetensors").unlink()
    checkpoints.loaded("plain").model.save_pretrained(folder, max_shard_size="100KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    load_model(str(folder))
    shards[1].unlink()
    with pytest.raises(ModelError, match=rf"{shards[1].name} \(named by .*is missing in {folder}"):
        load_model(str(folder))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: set_config(f, model_type="gpt2"), "'gpt2' is not supported; supported: llama"),
        (
            lambda f: set_config(f, model_type="mine", auto_map={"AutoConfig": "code.Config"}),
            "'mine' is not supported; supported: llama",
        ),
        (lambda f: (f / "config.json").unlink(), "config.json is missing in .*copy"),
        (lambda f: (f / "config.json").write_text("{"), "the config of .*copy.* can not be read"),
        (
            lambda f: (f / "model.safetensors").unlink(),
            "model.safetensors .* is missing in .*copy",
        ),
        (
            lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
            "weights in pytorch_model.bin alone; supported: safetensors",
        ),
        (
            lambda f: (f / "tokenizer.json").unlink(),
            "the tokenizer is missing in .*copy: tokenizer.json",
        ),
        (lambda f: (f / "tokenizer.json").write_text('{"a":'), "tokenizer of .* can not be loaded"),
        (
            lambda f: change_weights(f, lambda w: w.pop("model.layers.1.mlp.up_proj.weight")),
            "lacks weights .*: model.layers.1.mlp.up_proj.weight",
        ),
        (
            lambda f: change_weights(f, lambda w: w.update({"model.norm.weight": torch.ones(7)})),
            r"another shape .*: model.norm.weight \(7 instead of 48\)",
        ),
        (
            lambda f: change_weights(
                f, lambda w: w.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(48)})
            ),
            "no place for: model.layers.0.self_attn.q_proj.bias",
        ),
        (lambda f: set_config(f, num_hidden_layers=2), "no place for: .* and 6 more"),
        (
            lambda f: (f / "model.safetensors").write_bytes(b"not safetensors"),
            "copy can not be loaded: Error while deserializing header",
        ),
        (
            lambda f: set_config(f, quantization_config={"quant_method": "bitsandbytes"}),
            "quantized; supported: weights in float32",
        ),
        (
            lambda f: set_config(
                f,
                rope_parameters={
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    "long_factor": [1.0] * 6,
                    "short_factor": [1.0] * 6,
                    "original_max_position_embeddings": 32,
                    "factor": 2.0,
                },
            ),
            "rope type 'longrope' is not supported",
        ),
        (lambda f: set_config(f, model_type="gemma3n"), "gemma3_text, gemma3 \\(its text part\\)"),
    ],
)
def test_a_checkpoint_that_is_not_right_is_refused(
    folder: Path, damage: Callable[[Path], Any], message: str
) -> None:
    damage(folder)
    with pytest.raises(ModelError, match=message):
        load_model(str(folder))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention is not supported"),
        (
            {
                "rope_parameters": {
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                    "full_attention": {
                        "rope_type": "longrope",
                        "rope_theta": 1e4,
                        "long_factor": [1.0] * 8,
                        "short_factor": [1.0] * 8,
                        "original_max_position_embeddings": 32,
                        "factor": 2.0,
                    },
                }
            },
            "rope type 'longrope' is not supported",
        ),
    ],
)
def test_settings_of_a_family_that_a_trace_can_not_have_are_refused(
    checkpoints: Checkpoints, tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    folder = Path(shutil.copytree(checkpoints.folder("gemma3"), tmp_path / "copy"))
    set_config(folder, **fields)
    with pytest.raises(ModelError, match=message):
        load_model(str(folder))


def test_rotary_frequencies_of_older_checkpoints_are_passed_over(folder: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change_weights(folder, lambda w: w.update({name: torch.ones(6)}))
    load_model(str(folder))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float16"}, "overflows its range .* supported: float32, bfloat16"),
        ({"dtype": "int8"}, "'int8' is not supported; supported: auto, float32, bfloat16"),
        ({"device": "abacus"}, "'abacus' is unknown; supported: auto, cpu, cuda"),
        ({"device": "meta"}, "'meta' is not supported; supported: auto, cpu, cuda"),
        ({"device": "cuda:99"}, "'cuda:99' does not exist"),
        ({"revision": "main"}, "for hub ids; .* is a folder"),
    ],
)
def test_an_option_that_is_not_supported_is_refused(
    folder: Path, options: dict[str, str], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        load_model(str(folder), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("source", ["./nowhere", "a/b/c", "~/no-such-folder-here", "", "a b"])
def test_what_is_neither_a_folder_nor_a_hub_id_is_refused(source: str) -> None:
    with pytest.raises(ModelError, match=r"there is no folder .* and it is no hub id either"):
        load_model(source)


def test_a_file_is_not_a_model(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json is a file; a model is a folder"):
        load_model(str(folder / "config.json"))


def test_a_hub_that_can_not_be_reached_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline mode takes the same path as a hub that does not answer, without the retries."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="the config of 'nobody/nothing-here' can not be read"):
        load_model("nobody/nothing-here")
