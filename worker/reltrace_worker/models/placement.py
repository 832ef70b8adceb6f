"""The devices and the dtype of a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from reltrace_worker.models.sharding import Ranks
from reltrace_worker.types.errors import ModelError

DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a model is loaded to.

    `dtype` is that of the weights, or, where these are quantized, of what is computed with them.
    """

    device: torch.device
    dtype: torch.dtype
    load_in_4bit: bool = False
    # Loaded on the host, where it is divided before its parts go to their devices.
    divided: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of ``from_pretrained`` that place the model."""
        options: dict[str, Any] = {"dtype": self.dtype}
        if self.device.type != "cpu" and not self.divided:
            # Weight by weight to the device: the host's memory never holds all of them.
            options["device_map"] = {"": str(self.device)}
        if self.load_in_4bit:
            # As in LXT's examples/quantized_llama.py; float16 would overflow in the gradients.
            options["quantization_config"] = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
                load_in_4bit=True, bnb_4bit_compute_dtype=self.dtype
            )
        return options


def choose_placement(
    device: str, dtype: str, load_in_4bit: bool = False, ranks: Ranks | None = None
) -> Placement:
    """Check the arguments of :func:`reltrace_worker.models.loading.load_model` that place it."""
    divided = ranks is not None and ranks.size > 1
    target = _device(device)
    if ranks is not None and divided:
        if target.index is not None:
            raise ModelError(f"--tensor-parallel takes the first GPUs; it excludes {device!r}")
        if load_in_4bit:
            raise ModelError("weights in four bits are not divided; --tensor-parallel excludes it")
        if target.type == "cuda":
            if ranks.size > torch.cuda.device_count():
                raise ModelError(
                    f"--tensor-parallel {ranks.size} needs as many GPUs; torch "
                    f"{torch.__version__} sees {torch.cuda.device_count()}"
                )
            target = torch.device("cuda", ranks.rank)
    if load_in_4bit:
        if target.type != "cuda":
            raise ModelError(
                f"load_in_4bit needs a CUDA device; this model would be on {target.type!r}"
            )
        if find_spec("bitsandbytes") is None:
            raise ModelError("load_in_4bit needs the package: pip install bitsandbytes")
    return Placement(target, _dtype(dtype, target), load_in_4bit, divided)


def device_name(device: torch.device) -> str:
    """Return ``"cpu"``, or the name of the GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ModelError(f"device {name!r} is not supported; supported: auto, cpu, cuda, cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ModelError(
            f"device {name!r} does not exist: torch {torch.__version__} sees "
            f"{torch.cuda.device_count()} CUDA devices"
        )
    return device


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name in ("auto", "fastest"):
        # On CPUs with bfloat16 products but without AMX, float32 was the faster one.
        fast = device.type == "cuda" or (name == "fastest" and torch.cpu._is_amx_tile_supported())
        name = "bfloat16" if fast else "float32"
    if name in ("float16", "half", "fp16"):
        raise ModelError(
            "dtype 'float16' is not supported: relevance overflows its range and becomes NaN; "
            f"supported: {', '.join(DTYPES)}"
        )
    if name not in DTYPES:
        raise ModelError(
            f"dtype {name!r} is not supported; supported: auto, fastest, {', '.join(DTYPES)}"
        )
    return DTYPES[name]


def device_memory(devices: Sequence[torch.device]) -> dict[str, int]:
    """Return the bytes that torch uses of GPUs, by kind; none on a CPU."""
    bytes_used: Counter[str] = Counter()
    for device in devices:
        if device.type == "cuda":
            bytes_used.update(
                allocated=torch.cuda.memory_allocated(device),
                reserved=torch.cuda.memory_reserved(device),
                peak=torch.cuda.max_memory_allocated(device),
                total=torch.cuda.get_device_properties(device).total_memory,
            )
    return bytes_used


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor of the host to a device without waiting for what is queued there."""
    if device.type == "cuda":
        # From memory that is not pinned, a copy waits for the device all the same.
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
