"""Loading a model: safetensors and GGUF alone, never remote code, never random weights."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, FineGrainedFP8Config, PreTrainedModel
from transformers.utils import logging as transformers_logging

from reltrace_worker.models.families import (
    FAMILIES,
    TEXT_PARTS,
    Family,
    family_named,
)
from reltrace_worker.models.folder import check_folder, quantization
from reltrace_worker.models.gguf import GgufFile
from reltrace_worker.models.placement import Placement, choose_placement
from reltrace_worker.models.rope import check_config, context_length, fix_frequencies
from reltrace_worker.models.sharding import HEADS, NEURONS, Ranks, shard
from reltrace_worker.models.source import find_source, first_line
from reltrace_worker.types.errors import ModelError

# Older checkpoints carry the rotary frequencies, which are computed from the config.
_IGNORED_KEY = "rotary_emb.inv_freq"


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of a model; `layers` and `heads` count, the others are widths."""

    layers: int
    hidden_size: int
    heads: int
    intermediate_size: int
    vocab_size: int


@dataclass(frozen=True, slots=True, eq=False)
class LoadedModel:
    """A model in memory, ready for the engine: in eval mode, no parameter requires a gradient."""

    model: PreTrainedModel
    tokenizer: Any
    # Hub id, or name of the folder or file, unless another was given.
    name: str
    # Ends in "+4bit" where the weights were quantized while they were loaded.
    revision: str
    family: Family
    shape: ModelShape
    # Of weights and activations.
    dtype: torch.dtype
    device: torch.device
    # Longest prompt in tokens.
    context_length: int
    # Weights of the whole model: tied ones once, those that are packed into 4 bits one by one.
    parameters: int
    # Who computes it, and by what its tensors are divided among them (`sharding.HEADS`, ...).
    ranks: Ranks = field(default_factory=Ranks)
    divided: frozenset[str] = frozenset()

    @property
    def place(self) -> str:
        """The device, or how many of them: sums of their parts are rounded in another order."""
        return f"{self.ranks.size} x {self.device.type}" if self.divided else str(self.device)

    @property
    def shape_here(self) -> ModelShape:
        """The sizes of what this process computes."""
        heads, neurons = self.shape.heads, self.shape.intermediate_size
        return replace(
            self.shape,
            heads=heads // self.ranks.size if HEADS in self.divided else heads,
            intermediate_size=neurons // self.ranks.size if NEURONS in self.divided else neurons,
        )


@dataclass(frozen=True, slots=True)
class _Checkpoint:
    model_type: str
    tokenizer: Any
    # The arguments of ``from_pretrained``.
    options: dict[str, Any]
    # The weight files of a folder.
    shards: Sequence[Path] = ()
    # How the names of weights begin that are not loaded.
    ignored: tuple[str, ...] = ()
    gguf: GgufFile | None = None


def load_model(
    source: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    name: str | None = None,
    load_in_4bit: bool = False,
    context: int | None = None,
    ranks: Ranks | None = None,
) -> LoadedModel:
    """Load a model of a supported architecture; a ModelError says what is not supported.

    Weights are read, and dequantized where they are quantized (GGUF, fp8), one by one and to the
    device where they stay.

    Parameters
    ----------
    source
        Folder (config, safetensors weights, tokenizer), GGUF file, or hub id.
    revision
        Branch, tag or commit of a hub id; of a GGUF file ``sha256:`` and the beginning of its
        digest, which is checked.
    dtype
        ``"float32"``, ``"bfloat16"``, ``"auto"``: float32 on the CPU, bfloat16 on CUDA, or
        ``"fastest"``: bfloat16 also on a CPU with AMX.
    device
        ``"cpu"``, ``"cuda"``, ``"cuda:N"``, or ``"auto"``: CUDA where there is one.
    name
        Under which the model is served; default: hub id, or name of the folder or file.
    load_in_4bit
        Quantize the linear layers by bitsandbytes, on CUDA, and compute with them in `dtype`. Not
        run so far: it follows LXT's ``quantized_llama.py``.
    context
        Longest prompt in tokens; default: what the model's config allows.
    ranks
        The processes that compute the model together, of which this one loads its part: the first
        on the first GPU, and so on. A torch.distributed group of them must be there.
    """
    ranks = ranks or Ranks()
    placement = choose_placement(device, dtype, load_in_4bit, ranks)
    found = find_source(source, revision)
    if load_in_4bit and found.is_gguf:
        raise ModelError("a GGUF file is quantized already, which excludes load_in_4bit")
    checkpoint = (_open_gguf if found.is_gguf else _open_folder)(found.path, placement)
    check_config(checkpoint.options["config"])
    with ranks.in_turn(), ThreadPoolExecutor(1, "digest") as executor:
        # hashlib and torch release the interpreter lock, and both read the same cached pages.
        digest = executor.submit(found.revision, checkpoint.shards)
        model = _load_weights(checkpoint, str(found.path if found.commit is None else source))
        content = digest.result()
        config: Any = model.config
        length = context_length(config, context)
        fix_frequencies(model, length)
        if checkpoint.gguf is not None:
            checkpoint.gguf.scale_rotations(model)
        family = family_named(checkpoint.model_type)
        shape = ModelShape(
            layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            heads=config.num_attention_heads,
            intermediate_size=config.intermediate_size,
            vocab_size=config.vocab_size,
        )
        parameters = model.num_parameters()
        divided: frozenset[str] = frozenset()
        if ranks.size > 1:
            divided = shard(model, family, ranks)
            model.to(placement.device)  # type: ignore[arg-type]
    embeddings: Any = model.get_input_embeddings()
    return LoadedModel(
        model=model.requires_grad_(False).eval(),  # type: ignore[no-untyped-call]
        tokenizer=checkpoint.tokenizer,
        name=name or found.name,
        revision=f"{content}+4bit" if load_in_4bit else content,
        family=family,
        shape=shape,
        dtype=placement.dtype,
        device=embeddings.weight.device,
        context_length=length,
        parameters=parameters,
        ranks=ranks,
        divided=divided,
    )


def _open_gguf(path: Path, placement: Placement) -> _Checkpoint:
    file = GgufFile(path)
    config = file.config()
    # transformers takes these weights as those of safetensors: one by one, to their device.
    options = placement.options | {
        "pretrained_model_name_or_path": None,
        "config": AutoConfig.for_model(**config),
        "state_dict": file.weights(placement.dtype),
    }
    return _Checkpoint(_model_type(config), file.tokenizer(), options, gguf=file)


def _open_folder(folder: Path, placement: Placement) -> _Checkpoint:
    config, shards = check_folder(folder)
    model_type = _model_type(config)
    options = placement.options | {
        "pretrained_model_name_or_path": str(folder),
        "use_safetensors": True,
        "config": _build_config(str(folder)),
    }
    if quantization(config) is not None:
        if placement.load_in_4bit:
            raise ModelError("the checkpoint is quantized already, which excludes load_in_4bit")
        options["quantization_config"] = FineGrainedFP8Config(dequantize=True)
    ignored: tuple[str, ...] = ()
    if part := TEXT_PARTS.get(model_type):
        ignored = part.others
        options["config"] = options["config"].text_config
        options["key_mapping"] = {f"^{part.prefix}": ""}
    return _Checkpoint(model_type, _load_tokenizer(str(folder)), options, shards, ignored)


def _model_type(config: dict[str, Any]) -> str:
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise ModelError(f"config.json names no model_type; supported: {', '.join(FAMILIES)}")
    family_named(model_type)
    return model_type


def _build_config(path: str) -> Any:
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    # A value of another type raises whatever checks it or computes with it. The first line of the
    # message alone does not name the field.
    except Exception as error:
        raise ModelError(
            f"config.json of {path!r} is not valid: {' '.join(str(error).split())}"
        ) from error


def _load_tokenizer(path: str) -> Any:
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    # A damaged tokenizer.json raises a bare Exception of the tokenizers library.
    except Exception as error:
        raise ModelError(
            f"the tokenizer of {path!r} can not be loaded: {first_line(error)}"
        ) from error


def _load_weights(checkpoint: _Checkpoint, path: str) -> PreTrainedModel:
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        model, info = family_named(checkpoint.model_type).causal_lm.from_pretrained(
            **checkpoint.options,
            trust_remote_code=False,
            attn_implementation="sdpa",
            output_loading_info=True,
            # Reported below, by name and with both shapes.
            ignore_mismatched_sizes=True,
        )
    except (OSError, ValueError, RuntimeError, ImportError, KeyError, SafetensorError) as error:
        raise ModelError(f"{path!r} can not be loaded: {first_line(error)}") from error
    mismatched = [
        f"{key} ({_dimensions(stored)} instead of {_dimensions(expected)})"
        for key, stored, expected in info["mismatched_keys"]
    ]
    unexpected = [
        key
        for key in info["unexpected_keys"]
        if _IGNORED_KEY not in key and not key.startswith(checkpoint.ignored)
    ]
    for fault, keys in (
        ("lacks weights that its architecture has", info["missing_keys"]),
        ("has weights of another shape than its config says", mismatched),
        ("has weights that its architecture has no place for", unexpected),
    ):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise ModelError(
                f"the checkpoint {path!r} {fault}: {', '.join(sorted(keys)[:3])}{more}"
            )
    assert isinstance(model, PreTrainedModel)
    # What is not quantized in an fp8 checkpoint keeps the dtype that it is stored in.
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(checkpoint.options["dtype"])
    return model


def _dimensions(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))
