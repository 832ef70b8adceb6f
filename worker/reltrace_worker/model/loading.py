"""Loading a model: safetensors alone, never remote code, never random weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from reltrace_worker.errors import ModelError
from reltrace_worker.model.families import FAMILIES, TEXT_PARTS, Family, check_config, family_named
from reltrace_worker.model.placement import (
    DeviceMap,
    Placement,
    choose_placement,
    device_name,
)
from reltrace_worker.model.source import check_folder, folder_revision, local_folder

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
        Hub id, or name of the local folder, unless another was given.
    revision
        Commit hash of the hub, or a hash over the folder's files; ends in ``"+4bit"`` where the
        weights were quantized.
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


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _read_config(path: str, revision: str | None) -> dict[str, Any]:
    try:
        config, _ = PretrainedConfig.get_config_dict(path, revision=revision)
    except (OSError, ValueError) as error:
        raise ModelError(f"the config of {path!r} can not be read: {_first_line(error)}") from error
    if not config:
        raise ModelError(f"{path!r} has no config.json, or the hub can not be reached")
    return dict(config)


def _model_type(config: dict[str, Any]) -> str:
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise ModelError(f"config.json names no model_type; supported: {', '.join(FAMILIES)}")
    family_named(model_type)
    if config.get("quantization_config") is not None:
        raise ModelError(
            "the checkpoint is quantized; supported: weights in float32, bfloat16 or float16"
        )
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


def _text_part(path: str, revision: str | None, model_type: str) -> dict[str, Any]:
    """Return the arguments of ``from_pretrained`` that load a checkpoint's text part."""
    whole = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
    config = whole.text_config
    config._commit_hash = getattr(whole, "_commit_hash", None)
    return {"config": config, "key_mapping": {f"^{TEXT_PARTS[model_type].prefix}": ""}}


def _load_weights(
    path: str, revision: str | None, model_type: str, placement: Placement
) -> PreTrainedModel:
    family = family_named(model_type)
    ignored: tuple[str, ...] = ()
    try:
        options = placement.options
        if model_type in TEXT_PARTS:
            options |= _text_part(path, revision, model_type)
            ignored = TEXT_PARTS[model_type].others
        model, info = family.causal_lm.from_pretrained(
            path,
            **options,
            revision=revision,
            use_safetensors=True,
            trust_remote_code=False,
            attn_implementation="sdpa",
            output_loading_info=True,
            # Reported below, by name and with both shapes, as an error.
            ignore_mismatched_sizes=True,
        )
    except (OSError, ValueError, RuntimeError, ImportError, KeyError, SafetensorError) as error:
        raise ModelError(f"{path!r} can not be loaded: {_first_line(error)}") from error
    missing = sorted(info["missing_keys"])
    mismatched = sorted(
        f"{key} ({_dimensions(stored)} instead of {_dimensions(expected)})"
        for key, stored, expected in info["mismatched_keys"]
    )
    unexpected = sorted(
        key
        for key in info["unexpected_keys"]
        if _IGNORED_KEY not in key and not key.startswith(ignored)
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
    return model


def _load_tokenizer(path: str, revision: str | None) -> Any:
    try:
        return AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)
    # A damaged tokenizer.json surfaces as a bare Exception of the tokenizers library.
    except Exception as error:
        raise ModelError(
            f"the tokenizer of {path!r} can not be loaded: {_first_line(error)}"
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
) -> LoadedModel:
    """Load a model of a supported architecture.

    Parameters
    ----------
    source
        Local folder (config, safetensors weights, tokenizer) or hub id.
    revision
        Branch, tag or commit of a hub id.
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
    folder = local_folder(source)
    if folder is not None:
        if revision is not None:
            raise ModelError(f"a revision ({revision!r}) is for hub ids; {source} is a folder")
        check_folder(folder)
    path = source if folder is None else str(folder)
    model_type = _model_type(_read_config(path, revision))
    tokenizer = _load_tokenizer(path, revision)
    with _no_progress_bars():
        model = _load_weights(path, revision, model_type, placement)
    config: Any = model.config
    check_config(config)
    placement.settle(model)
    module: nn.Module = model
    embeddings: Any = model.get_input_embeddings()
    module.requires_grad_(False).train(False)
    if folder is None:
        weights = str(getattr(config, "_commit_hash", None) or revision or "main")
    else:
        weights = folder_revision(folder)
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        name=name or (source if folder is None else folder.resolve().name),
        revision=f"{weights}+4bit" if load_in_4bit else weights,
        family=family_named(model_type),
        shape=ModelShape(
            layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            heads=config.num_attention_heads,
            intermediate_size=config.intermediate_size,
            vocab_size=config.vocab_size,
        ),
        dtype=placement.dtype,
        device=embeddings.weight.device,
        context_length=config.max_position_embeddings,
    )
