"""Loading: what is supported loads, everything else says what is wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType
from reference.checkpoints import Recipe, save_checkpoint
from reference.gguf_files import write_gguf
from reference.loaded import Checkpoints, prepare, run
from reltrace_worker.engine import Engine
from reltrace_worker.models import load_model
from reltrace_worker.session.headers import model_info
from reltrace_worker.types.errors import InvalidJob, ModelError
from reltrace_worker.types.jobs import TraceRequest
from safetensors.torch import load_file, save_file


@pytest.fixture
def folder(checkpoints: Checkpoints, tmp_path: Path) -> Path:
    """A copy of a good checkpoint, to be damaged."""
    return Path(shutil.copytree(checkpoints.folder("plain"), tmp_path / "copy"))


def set_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def index(folder: Path, content: Any) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_loaded_model_describes_itself(checkpoints: Checkpoints) -> None:
    loaded = load_model(str(checkpoints.folder("tied")), device="cpu")
    about = model_info(loaded)
    assert (about.name, about.architecture) == ("tied", "LlamaForCausalLM")
    assert (about.layers, about.hidden_size, about.heads) == (3, 48, 4)
    assert (about.intermediate_size, about.vocab_size, about.context_length) == (80, 320, 128)
    # The head shares the embeddings and counts once.
    layer = 4 * 48 * 48 + 3 * 48 * 80 + 2 * 48
    assert about.parameters == 320 * 48 + 3 * layer + 48
    assert (loaded.dtype, loaded.device) == (torch.float32, torch.device("cpu"))
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
    run(Engine(loaded), prepare(loaded, TraceRequest("A cat")))


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
        (lambda f: (f / "config.json").write_text("{"), r"copy.config\.json can not be read"),
        (
            lambda f: (f / "model.safetensors").unlink(),
            "model.safetensors .* is missing in .*copy",
        ),
        (
            lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
            "is missing in .*copy; pytorch_model.bin is of a format that is not supported",
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
            "quantized by bitsandbytes; supported: weights in float32",
        ),
        (
            lambda f: set_config(f, quantization_config={"quant_method": "gptq"}),
            "quantized by gptq; .* Serve the checkpoint that it was made from .* or a GGUF file",
        ),
        (
            lambda f: set_config(f, text_config={"quantization_config": {"quant_method": "awq"}}),
            "quantized by awq; .* Serve the checkpoint that it was made from .* or a GGUF file",
        ),
        (
            lambda f: set_config(
                f,
                rope_parameters={
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    "long_factor": "six",
                    "short_factor": [1.0] * 6,
                    "original_max_position_embeddings": 32,
                    "factor": 2.0,
                },
            ),
            "long_factor in rope_parameters .* is 'six'; it must be a list of numbers",
        ),
        (
            lambda f: set_config(
                f,
                rope_parameters={
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    "long_factor": [1.0] * 6,
                    "short_factor": [1.0] * 6,
                    "original_max_position_embeddings": None,
                    "factor": 2.0,
                },
            ),
            "original_max_position_embeddings in rope_parameters .* is None; it must be a number",
        ),
        (
            lambda f: set_config(f, quantization_config="x"),
            "quantization_config in config.json is 'x'; it must be a JSON object",
        ),
        (
            lambda f: set_config(f, text_config=[]),
            r"text_config in config.json is \[\]; it must be a JSON object",
        ),
        (
            lambda f: set_config(f, max_position_embeddings=None),
            "config.json of .*copy' is not valid: .* 'max_position_embeddings' expected int",
        ),
        (
            lambda f: set_config(f, rope_parameters={"rope_type": "yarn"}),
            "config.json of .*copy' is not valid: .* keys in `rope_parameters` .*'factor'",
        ),
        (
            lambda f: set_config(f, rope_parameters={"rope_type": "yarn", "factor": "four"}),
            "factor in rope_parameters .*config.json is 'four'; it must be a number",
        ),
        (
            lambda f: set_config(f, rope_parameters={"rope_type": "linear", "factor": None}),
            "factor in rope_parameters .*config.json is None; it must be a number",
        ),
        (
            lambda f: set_config(f, rope_parameters={"rope_type": "spiral"}),
            "rope type 'spiral' in config.json is unknown",
        ),
        (lambda f: index(f, []), r"index\.json holds no JSON object"),
        (lambda f: index(f, {}), r"index\.json in .*copy has no weight_map"),
        (
            lambda f: index(f, {"weight_map": []}),
            r"weight_map in .*index\.json is \[\]; it must be a JSON object",
        ),
        (
            lambda f: index(f, {"weight_map": {"a": 5}}),
            r"weight_map in .*index\.json gives 5 for a; it must be the name of a file",
        ),
        (
            lambda f: set_config(f, model_type="gemma3n"),
            "gemma3_text, .*, gemma3 \\(its text part\\)",
        ),
    ],
)
def test_a_checkpoint_that_is_not_right_is_refused(
    folder: Path, damage: Callable[[Path], Any], message: str
) -> None:
    damage(folder)
    with pytest.raises(ModelError, match=message) as caught:
        load_model(str(folder))
    assert "\n" not in str(caught.value)


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
        ({"dtype": "int8"}, "'int8' is not supported; supported: auto, fastest, float32"),
        ({"device": "abacus"}, "'abacus' is not supported; supported: auto, cpu, cuda"),
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
    with pytest.raises(ModelError, match=r"config\.json is a file; a model is .*, a \.gguf file"):
        load_model(str(folder / "config.json"))


FP8_BLOCK = 16


def to_fp8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize a matrix in blocks, as fp8 checkpoints hold it: weights and scales."""
    rows, columns = (size // FP8_BLOCK for size in weight.shape)
    blocks = weight.reshape(rows, FP8_BLOCK, columns, FP8_BLOCK)
    scales = blocks.abs().amax((1, 3)) / 448
    scaled = (blocks / scales[:, None, :, None]).reshape(weight.shape)
    return scaled.to(torch.float8_e4m3fn), scales


def from_fp8(weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    grown = scales.repeat_interleave(FP8_BLOCK, 0).repeat_interleave(FP8_BLOCK, 1)
    return weight.float() * grown


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_in_fp8_is_dequantized(folder: Path, dtype: str) -> None:
    """
    Given a checkpoint whose linear layers are in fp8 with a scale per block
    I expect a plain model of the values that they stand for, in one number format.
    """
    wanted = {}

    def quantize(weights: dict[str, torch.Tensor]) -> None:
        for name in [name for name in weights if name.endswith("proj.weight")]:
            weights[name], scales = to_fp8(weights[name])
            weights[f"{name}_scale_inv"] = scales
            wanted[name] = from_fp8(weights[name], scales)

    change_weights(folder, quantize)
    fp8 = {"quant_method": "fp8", "weight_block_size": [FP8_BLOCK, FP8_BLOCK]}
    set_config(folder, quantization_config=fp8)
    loaded = load_model(str(folder), dtype=dtype)
    assert {p.dtype for p in loaded.model.parameters()} == {getattr(torch, dtype)}
    assert loaded.model.get_submodule("model.rotary_emb").inv_freq.dtype == torch.float32
    weights = loaded.model.state_dict()
    assert len(wanted) == 7 * 3
    for name, values in wanted.items():
        assert torch.equal(weights[name], values.to(getattr(torch, dtype))), name
    assert getattr(loaded.model.config, "quantization_config", None) is None
    run(Engine(loaded), prepare(loaded, TraceRequest("A cat")))


@pytest.mark.parametrize(
    ("rope", "longest"),
    [
        ({"rope_type": "default"}, 128),
        # Case: a prompt of 300 tokens was refused.
        ({"rope_type": "yarn", "factor": 4.0}, 512),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, 128),
        ({"rope_type": "linear", "factor": 2.5}, 320),
        ({"rope_type": "dynamic", "factor": 4.0}, 512),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
            128,
        ),
    ],
)
def test_the_context_follows_scaled_rotary_embeddings(
    folder: Path, rope: dict[str, Any], longest: int
) -> None:
    """
    Given rotary embeddings that are scaled
    I expect the context that vLLM gives them, prompts of that length, and less on request.
    """
    set_config(folder, rope_parameters={"rope_theta": 1e4, **rope})
    loaded = load_model(str(folder))
    assert loaded.context_length == longest
    longest_prompt = tuple(10 + i % 300 for i in range(longest))
    (result,) = run(Engine(loaded), prepare(loaded, TraceRequest(longest_prompt)))
    assert result.tensors[0].values.isfinite().all()
    with pytest.raises(InvalidJob, match=f"{longest + 1} tokens; .* holds {longest}"):
        prepare(loaded, TraceRequest((*longest_prompt, 9)))
    assert load_model(str(folder), context=100).context_length == 100
    for asked in (0, longest + 1):
        with pytest.raises(ModelError, match=f"{asked} is not possible; .*: 1 to {longest} tokens"):
            load_model(str(folder), context=asked)


def test_dynamic_rotations_depend_on_no_other_prompt(folder: Path) -> None:
    """
    Given dynamic rotary embeddings, whose frequencies transformers takes from the longest prompt
    If a short prompt runs alone, and beside one beyond max_position_embeddings
    I expect the same numbers; and those of unscaled embeddings where the context ends there.
    """
    set_config(folder, max_position_embeddings=64)
    plain = load_model(str(folder))
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    set_config(folder, rope_parameters=rope)
    short, long = tuple(range(20, 60)), tuple(10 + i % 300 for i in range(250))
    loaded = load_model(str(folder))
    alone, beside = (
        run(Engine(loaded), prepare(loaded, *(TraceRequest(ids) for ids in prompts)))[0]
        for prompts in ([short], [short, long])
    )
    torch.testing.assert_close(
        beside.tensors[0].values, alone.tensors[0].values, rtol=1e-3, atol=1e-5
    )
    unscaled = load_model(str(folder), context=64)
    ours, wanted = (run(Engine(m), prepare(m, TraceRequest(short)))[0] for m in (unscaled, plain))
    torch.testing.assert_close(ours.tensors[0].values, wanted.tensors[0].values)
    assert not torch.allclose(alone.tensors[0].values, wanted.tensors[0].values, rtol=1e-2)


PEAK = """
import sys, threading
from reltrace_worker.models import load_model

def anonymous():
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return 1024 * int(lines["RssAnon"].split()[0])

before = peak = anonymous()
stop = threading.Event()

def watch():
    global peak
    while not stop.wait(0.001):
        peak = max(peak, anonymous())

watching = threading.Thread(target=watch)
watching.start()
model = load_model(sys.argv[1], dtype=sys.argv[2], device="cpu").model
stop.set()
watching.join()
print((peak - before) / sum(p.nbytes for p in model.parameters()))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_weights_are_in_memory_once(tmp_path: Path, kind: str, dtype: str) -> None:
    """
    Given a model of 37 million weights, in float32 or as Q8_0
    If a fresh process loads it
    I expect its memory to grow by the weights and what little tokenizer and headers take.
    """
    recipe = Recipe(
        layers=6, hidden_size=512, heads=8, key_value_heads=8, intermediate_size=2048,
        vocab_size=12_288,
    )  # fmt: skip
    if kind == "gguf":
        path = write_gguf(tmp_path / "a.gguf", recipe, GGMLQuantizationType.Q8_0)
    else:
        path = save_checkpoint(tmp_path / "a", recipe)
    command = [sys.executable, "-c", PEAK, str(path), dtype]
    growth = float(subprocess.check_output(command, text=True, timeout=300))
    assert growth < 1.6
