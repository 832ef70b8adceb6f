"""What a checkpoint's folder must hold: a config, safetensors weights and a tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import structlog
from safetensors import SafetensorError, safe_open

from reltrace_worker.types.errors import ModelError

log = structlog.get_logger()

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
ADAPTER = "adapter_config.json"
TOKENIZERS = ("tokenizer.json", "tokenizer.model")

_FLOATS = {"F64", "F32", "F16", "BF16"}
_FP8 = {"F8_E4M3"}
# Files that look like other weights, and how those of them begin that only training needs.
_OTHER_WEIGHTS = ("*.safetensors", "*.gguf", "*.pth", "*.pt", "pytorch_model*.bin")
_TRAINING_STATE = ("rng_state", "optimizer", "scheduler", "scaler", "training_args")


def check_folder(folder: Path) -> tuple[dict[str, Any], list[Path]]:
    """Return the config and the weight files of a folder, as transformers takes them.

    Where a file is missing, or it is not clear which weights are meant, the folder is refused.
    """
    shards = _shards(folder)
    if (folder / ADAPTER).is_file():
        base = _read_json(folder / ADAPTER).get("base_model_name_or_path")
        raise ModelError(
            f"{folder} holds an adapter ({ADAPTER}) of the base model {base!r}: merge it into that "
            "(peft: merge_and_unload, save_pretrained) and serve the result, or move it elsewhere"
        )
    if not (folder / "config.json").is_file():
        if files := _matching(folder, "*.gguf"):
            raise ModelError(f"{folder} holds GGUF files: give the path of one, such as {files[0]}")
        raise ModelError(f"config.json is missing in {folder}")
    config = _read_json(folder / "config.json")
    missing = sorted(shard.name for shard in shards if not shard.is_file())
    if missing == [WEIGHTS]:
        others = _matching(folder, "*.bin", "*.pt", "*.pth")
        raise ModelError(
            f"{WEIGHTS} (or {INDEX} and its shards) is missing in {folder}"
            + (f"; {others[0]} is of a format that is not supported" if others else "")
        )
    if missing:
        raise ModelError(f"{', '.join(missing)} (named by {INDEX}) is missing in {folder}")
    allowed = _FLOATS if quantization(config) is None else _FLOATS | _FP8
    for shard in shards:
        _check_dtypes(shard, allowed)
    if not any((folder / name).is_file() for name in TOKENIZERS):
        raise ModelError(f"the tokenizer is missing in {folder}: tokenizer.json or tokenizer.model")
    _check_unused(folder, {shard.name for shard in shards})
    return config, shards


def index_shards(folder: Path) -> list[str]:
    """Return the names of the weight files that a folder's index lists."""
    weight_map = _object(_read_json(folder / INDEX), "weight_map", INDEX)
    if weight_map is None:
        raise ModelError(f"{INDEX} in {folder} has no weight_map")
    for weight, name in weight_map.items():
        if not isinstance(name, str):
            raise ModelError(
                f"weight_map in {INDEX} gives {name!r} for {weight}; it must be the name of a file"
            )
    return sorted(set(weight_map.values()))


def quantization(config: dict[str, Any]) -> str | None:
    """Return how weights are quantized that can be dequantized as they load; None: they are not."""
    text_config = _object(config, "text_config") or {}
    settings = _object(config, "quantization_config")
    if settings is None:
        settings = _object(text_config, "quantization_config")
    if settings is None:
        return None
    method = str(settings.get("quant_method", "an unknown method"))
    if method != "fp8":
        raise ModelError(
            f"the checkpoint is quantized by {method}; supported: weights in float32, bfloat16 or "
            "float16, fp8 in blocks, and GGUF files. Serve the checkpoint that it was made from "
            "(with --load-in-4bit on a GPU, if it is too large), or a GGUF file of it"
        )
    return method


def _shards(folder: Path) -> list[Path]:
    # As transformers looks for them: a single file first.
    indexed = not (folder / WEIGHTS).is_file() and (folder / INDEX).is_file()
    return [folder / name for name in (index_shards(folder) if indexed else [WEIGHTS])]


def _matching(folder: Path, *patterns: str) -> list[str]:
    return sorted({path.name for pattern in patterns for path in folder.glob(pattern)})


def _check_unused(folder: Path, used: set[str]) -> None:
    """Log weights that are not read; refuse a second set of them."""
    unused = [
        name
        for name in _matching(folder, *_OTHER_WEIGHTS)
        if name not in used and not name.startswith(_TRAINING_STATE)
    ]
    if WEIGHTS in used and (folder / INDEX).is_file():
        if second := [name for name in index_shards(folder) if name in unused]:
            raise ModelError(
                f"{folder} has two sets of weights, {WEIGHTS} and {', '.join(second)} (named by "
                f"{INDEX}); remove one"
            )
        unused.append(INDEX)
    if unused:
        log.warning("model.files_not_used", folder=str(folder), files=unused, used=sorted(used))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} can not be read: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds no JSON object")
    return content


def _object(content: dict[str, Any], field: str, file: str = "config.json") -> Any:
    value = content.get(field)
    if value is not None and not isinstance(value, dict):
        raise ModelError(f"{field} in {file} is {value!r}; it must be a JSON object")
    return value


def _check_dtypes(path: Path, allowed: set[str]) -> None:
    """Refuse quantized weights, which transformers would take for numbers as they stand."""
    try:
        with safe_open(path, "pt") as file:
            dtypes = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path.parent} can not be loaded: {error}") from error
    for name, dtype in sorted(dtypes.items()):
        if dtype not in allowed:
            raise ModelError(
                f"{name} in {path.name} is of type {dtype}; supported: weights in float32, "
                "bfloat16 or float16"
            )
