"""Loading a model: safetensors and GGUF alone, never remote code, never random weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    FineGrainedFP8Config,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from reltrace_worker.models.families import (
    FAMILIES,
    TEXT_PARTS,
    Family,
    family_named,
)
from reltrace_worker.models.gguf import GgufFile
from reltrace_worker.models.placement import (
    DeviceMap,
    Placement,
    choose_placement,
    device_name,
)
from reltrace_worker.models.rope import check_config, context_length, fix_frequencies
from reltrace_worker.models.source import (
    check_folder,
    find_source,
    first_line,
    quantization,
)
from reltrace_worker.types.errors import ModelError

# Older checkpoints carry the rotary frequencies, which are computed from the config.
_IGNORED_KEY = "rotary_emb.inv_freq"


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of a model; `layers`, `heads` and the like count, the others are widths."""

    layers: int
    hidden_size: int
    heads: int
    intermediate_size: int
    vocab_size: int


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """A model as it is announced.

    Parameters
    ----------
    name, revision
        As in :class:`LoadedModel`.
    architecture
        Class of the model, for example ``"LlamaForCausalLM"``.
    layers, hidden_size, heads, intermediate_size, vocab_size
        Sizes.
    context_length
        Longest prompt in tokens.
    parameters
        Number of weights; tied ones count once.
    dtype
        ``"float32"`` or ``"bfloat16"``.
    device
        ``"cpu"``, or the name of the GPU; of a split model, how many GPUs there are of each name.
    """

    name: str
    revision: str
    architecture: str
    layers: int
    hidden_size: int
    heads: int
    intermediate_size: int
    vocab_size: int
    context_length: int
    parameters: int
    dtype: str
    device: str


@dataclass(frozen=True, slots=True, eq=False)
class LoadedModel:
    """A model in memory, ready for the engine.

    Parameters
    ----------
    model
        In eval mode; no parameter requires a gradient.
    tokenizer
        Its tokenizer.
    name
        Hub id, or name of the folder or file, unless another was given.
    revision
        Commit of the hub, or a digest of the folder's files or of the GGUF file; ends in
        ``"+4bit"`` where the weights were quantized.
    family
        Its row of the architecture table.
    shape
        Its sizes.
    dtype
        Of weights and activations.
    device
        Where its embeddings are, and all of it, unless it is split.
    context_length
        Longest prompt in tokens.
    """

    model: PreTrainedModel
    tokenizer: Any
    name: str
    revision: str
    family: Family
    shape: ModelShape
    dtype: torch.dtype
    device: torch.device
    context_length: int

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """Every device that holds a part of the model, in the order of the parts."""
        return tuple(dict.fromkeys(p.device for p in self.model.parameters()))

    def describe(self) -> ModelDescription:
        """Return what the worker announces of this model."""
        return ModelDescription(
            name=self.name,
            revision=self.revision,
            architecture=type(self.model).__name__,
            layers=self.shape.layers,
            hidden_size=self.shape.hidden_size,
            heads=self.shape.heads,
            intermediate_size=self.shape.intermediate_size,
            vocab_size=self.shape.vocab_size,
            context_length=self.context_length,
            # Counts weights that are packed into 4 bits one by one.
            parameters=self.model.num_parameters(),
            dtype=str(self.dtype).removeprefix("torch."),
            device=device_name(self.devices),
        )


def _read_config(path: str) -> dict[str, Any]:
    try:
        config, _ = PretrainedConfig.get_config_dict(path)
    except (OSError, ValueError) as error:
        raise ModelError(f"the config of {path!r} can not be read: {first_line(error)}") from error
    return dict(config)


def _build_config(path: str) -> Any:
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    # A value of another type surfaces as it comes up: as what the check of types raises, or as the
    # error of what is computed with it. The first line alone does not say of which field.
    except Exception as error:
        raise ModelError(
            f"config.json of {path!r} is not valid: {' '.join(str(error).split())}"
        ) from error


def _model_type(config: dict[str, Any]) -> str:
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise ModelError(f"config.json names no model_type; supported: {', '.join(FAMILIES)}")
    family_named(model_type)
    return model_type


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _dimensions(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


@dataclass(frozen=True, slots=True)
class _Checkpoint:
    """What is loaded, and how ``from_pretrained`` takes its weights.

    Parameters
    ----------
    shards
        The files of a folder's weights.
    gguf
        The file, if it is one.
    model_type
        In its config.
    tokenizer
        Its tokenizer.
    options
        The arguments of ``from_pretrained``.
    ignored
        How the names of weights begin that are left out.
    """

    shards: Sequence[Path]
    gguf: GgufFile | None
    model_type: str
    tokenizer: Any
    options: dict[str, Any]
    ignored: tuple[str, ...] = ()


def _open_gguf(path: Path, placement: Placement) -> _Checkpoint:
    file = GgufFile(path)
    config = file.config()
    model_type = _model_type(config)
    # transformers takes these as it takes a safetensors file: one by one, to their device.
    options = {
        "pretrained_model_name_or_path": None,
        "config": AutoConfig.for_model(**config),
        "state_dict": file.weights(placement.dtype),
    }
    return _Checkpoint((), file, model_type, file.tokenizer(), placement.options | options)


def _open_folder(folder: Path, placement: Placement) -> _Checkpoint:
    shards, path = check_folder(folder), str(folder)
    config = _read_config(path)
    model_type = _model_type(config)
    built = _build_config(path)
    options = placement.options | {"pretrained_model_name_or_path": path, "use_safetensors": True}
    ignored: tuple[str, ...] = ()
    if quantization(config) is not None:
        if placement.load_in_4bit:
            raise ModelError("the checkpoint is quantized already, which excludes load_in_4bit")
        options["quantization_config"] = FineGrainedFP8Config(dequantize=True)
    if model_type in TEXT_PARTS:
        prefix, ignored = TEXT_PARTS[model_type].prefix, TEXT_PARTS[model_type].others
        built = built.text_config
        options["key_mapping"] = {f"^{prefix}": ""}
    options["config"] = built
    return _Checkpoint(shards, None, model_type, _load_tokenizer(path), options, ignored)


def _load_weights(checkpoint: _Checkpoint, path: str) -> PreTrainedModel:
    family = family_named(checkpoint.model_type)
    try:
        model, info = family.causal_lm.from_pretrained(
            **checkpoint.options,
            trust_remote_code=False,
            attn_implementation="sdpa",
            output_loading_info=True,
            # Reported below, by name and with both shapes, as an error.
            ignore_mismatched_sizes=True,
        )
    except (OSError, ValueError, RuntimeError, ImportError, KeyError, SafetensorError) as error:
        raise ModelError(f"{path!r} can not be loaded: {first_line(error)}") from error
    missing = sorted(info["missing_keys"])
    mismatched = sorted(
        f"{key} ({_dimensions(stored)} instead of {_dimensions(expected)})"
        for key, stored, expected in info["mismatched_keys"]
    )
    unexpected = sorted(
        key
        for key in info["unexpected_keys"]
        if _IGNORED_KEY not in key and not key.startswith(checkpoint.ignored)
    )
    for fault, keys in (
        ("lacks weights that its architecture has", missing),
        ("has weights of another shape than its config says", mismatched),
        ("has weights that its architecture has no place for", unexpected),
    ):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise ModelError(f"the checkpoint {path!r} {fault}: {', '.join(keys[:3])}{more}")
    assert isinstance(model, PreTrainedModel)
    # Of a checkpoint in fp8, what is not quantized keeps the type that it is stored in.
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(checkpoint.options["dtype"])
    return model


def _load_tokenizer(path: str) -> Any:
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    # A damaged tokenizer.json surfaces as a bare Exception of the tokenizers library.
    except Exception as error:
        raise ModelError(
            f"the tokenizer of {path!r} can not be loaded: {first_line(error)}"
        ) from error


def load_model(
    source: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    name: str | None = None,
    device_map: DeviceMap | None = None,
    load_in_4bit: bool = False,
    context: int | None = None,
) -> LoadedModel:
    """Load a model of a supported architecture.

    Weights are read, and dequantized where they are quantized (GGUF, fp8), one by one and to the
    device where they stay. A digest of their files is computed meanwhile, in another thread.

    Parameters
    ----------
    source
        Folder (config, safetensors weights, tokenizer), GGUF file, or hub id.
    revision
        Branch, tag or commit of a hub id; of a GGUF file ``sha256:`` and the beginning of its
        digest, which is checked.
    dtype
        ``"float32"``, ``"bfloat16"``, or ``"auto"``: float32 on the CPU, bfloat16 on CUDA.
        The checkpoint itself may be stored in float16.
    device
        ``"cpu"``, ``"cuda"``, ``"cuda:N"``, or ``"auto"``: CUDA where there is one.
    name
        Name under which the model is served; default: hub id or folder name.
    device_map
        ``"auto"`` splits the model over all GPUs by accelerate, and so does a mapping from
        the paths of modules to devices. Excludes `device`.
    load_in_4bit
        Quantize the weights of the linear layers by bitsandbytes, on CUDA. `dtype` is that of
        what is computed with them. Not run so far: it follows LXT's ``quantized_llama.py``.
    context
        Longest prompt in tokens; default: what the model's config allows.

    Returns
    -------
    LoadedModel
        In eval mode, no parameter requiring a gradient.

    Raises
    ------
    ModelError
        Says what is wrong and what is supported.
    """
    placement = choose_placement(device, dtype, device_map, load_in_4bit)
    found = find_source(source, revision)
    if load_in_4bit and found.is_gguf:
        raise ModelError("a GGUF file is quantized already, which excludes load_in_4bit")
    opened = (_open_gguf if found.is_gguf else _open_folder)(found.path, placement)
    check_config(opened.options["config"])
    with ThreadPoolExecutor(1, "digest") as beside, _no_progress_bars():
        # hashlib and torch let go of the interpreter, and both read the pages of one file cache.
        digest = beside.submit(found.revision, opened.shards)
        model = _load_weights(opened, str(found.path if found.commit is None else source))
        weights = digest.result()
    config: Any = model.config
    placement.check(model)
    length = context_length(config, context)
    fix_frequencies(model, length)
    if opened.gguf is not None:
        opened.gguf.scale_rotations(model)
    module: nn.Module = model
    embeddings: Any = model.get_input_embeddings()
    module.requires_grad_(False).train(False)
    return LoadedModel(
        model=model,
        tokenizer=opened.tokenizer,
        name=name or found.name,
        revision=f"{weights}+4bit" if load_in_4bit else weights,
        family=family_named(opened.model_type),
        shape=ModelShape(
            layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            heads=config.num_attention_heads,
            intermediate_size=config.intermediate_size,
            vocab_size=config.vocab_size,
        ),
        dtype=placement.dtype,
        device=embeddings.weight.device,
        context_length=length,
    )
