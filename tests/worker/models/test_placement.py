"""Where weights go: one device, several, or four bits; what is missing is named."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from reference.checkpoints import FAMILY_RECIPES
from reference.loaded import PROMPTS, Checkpoints, prepare, run
from reltrace_proto.v1 import types_pb2
from reltrace_worker.engine import SITES, Engine
from reltrace_worker.lrp import RULES, verify_rule
from reltrace_worker.models import LoadedModel, load_model, placement
from reltrace_worker.models.placement import Placement, choose_placement, device_name
from reltrace_worker.session.headers import model_info
from reltrace_worker.types.errors import ModelError
from reltrace_worker.types.jobs import TargetRequest, TraceRequest
from reltrace_worker.types.results import JobResult
from torch.utils._python_dispatch import TorchDispatchMode


@pytest.fixture
def without_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """No bitsandbytes, and no CUDA device."""
    monkeypatch.setattr(placement, "find_spec", lambda _: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def with_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes and one CUDA device, as far as the checks can see."""
    monkeypatch.setattr(placement, "find_spec", lambda _: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)


@pytest.mark.usefixtures("without_packages")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device_map": "balanced"}, "'balanced' is not supported; supported: auto"),
        ({"device_map": "auto", "device": "cpu"}, "'cpu' and a device_map exclude each other"),
        ({"load_in_4bit": True}, "needs a CUDA device; this model would be on 'cpu'"),
        ({"load_in_4bit": True, "device": "cpu"}, "needs a CUDA device"),
    ],
)
def test_what_is_missing_is_named(
    checkpoints: Checkpoints, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        load_model(str(checkpoints.folder("plain")), **options)


def test_a_split_over_gpus_needs_gpus(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelError, match=r"needs GPUs; torch .* sees no CUDA device"):
        load_model(str(checkpoints.folder("plain")), device_map="auto")


@pytest.mark.usefixtures("with_packages")
def test_four_bits_need_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "find_spec", lambda name: name != "bitsandbytes" or None)
    with pytest.raises(ModelError, match="load_in_4bit needs the package: pip install bits"):
        choose_placement("auto", "auto", load_in_4bit=True)


@pytest.mark.usefixtures("with_packages")
@pytest.mark.parametrize(
    ("device", "dtype", "amx", "chosen"),
    [
        ("cpu", "auto", True, torch.float32),
        ("cpu", "fastest", True, torch.bfloat16),
        ("cpu", "fastest", False, torch.float32),
        ("cuda", "auto", False, torch.bfloat16),
        ("cuda", "fastest", False, torch.bfloat16),
    ],
)
def test_bfloat16_on_a_cpu_is_chosen_where_speed_is_asked_for_and_amx_is_there(
    monkeypatch: pytest.MonkeyPatch, device: str, dtype: str, amx: bool, chosen: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert choose_placement(device, dtype).dtype == chosen


def test_a_model_that_is_to_be_fastest_says_what_it_is(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Given a CPU with AMX
    If a model is loaded for speed
    I expect bfloat16 weights, and that format in what provenance is made of.
    """
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    loaded = load_model(str(checkpoints.folder("plain")), dtype="fastest", device="cpu")
    assert loaded.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.bfloat16}
    assert model_info(loaded).dtype == types_pb2.SCALAR_TYPE_BFLOAT16


@pytest.mark.usefixtures("with_packages")
def test_the_options_of_from_pretrained(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in LXT's examples/quantized_llama.py: four bits, computed with in bfloat16."""
    split = choose_placement("auto", "auto", "auto")
    assert split.options == {"dtype": torch.bfloat16, "device_map": "auto"}
    # Weight by weight to the only device, too.
    alone = choose_placement("cuda:0", "float32")
    assert alone.options == {"dtype": torch.float32, "device_map": {"": "cuda:0"}}
    assert choose_placement("cpu", "auto").options == {"dtype": torch.float32}
    # The quantization config asks for the version of the package it is meant for.
    monkeypatch.setitem(sys.modules, "bitsandbytes", ModuleType("bitsandbytes"))
    four_bits = choose_placement("cuda:0", "auto", load_in_4bit=True).options
    assert (four_bits["dtype"], four_bits["device_map"]) == (torch.bfloat16, {"": "cuda:0"})
    config = four_bits["quantization_config"]
    assert config.load_in_4bit
    assert config.bnb_4bit_compute_dtype == torch.bfloat16
    both = choose_placement("auto", "float32", "auto", load_in_4bit=True).options
    assert (both["dtype"], both["device_map"]) == (torch.float32, "auto")
    assert both["quantization_config"].bnb_4bit_compute_dtype == torch.float32


@pytest.mark.parametrize(
    ("places", "fits"),
    [
        ({"model.layers.0": 0, "model.layers.1": "cpu"}, False),
        ({"model.layers.0": 0, "model.layers.1": "disk"}, False),
        ({"model.layers.0": "cpu", "model.layers.1": "disk"}, False),
        ({"model.layers.0": 0, "model.layers.1": 1}, True),
        ({"": "cpu"}, True),
    ],
)
def test_a_model_that_is_offloaded_does_not_fit(
    checkpoints: Checkpoints, places: dict[str, Any], fits: bool
) -> None:
    model: Any = checkpoints.loaded("plain").model
    chosen = Placement(torch.device("cuda"), torch.float32, "auto", load_in_4bit=False)
    model.hf_device_map = places
    try:
        if fits:
            chosen.check(model)
        else:
            with pytest.raises(ModelError, match=r"does not fit .*: model\.layers\.1 would be"):
                chosen.check(model)
    finally:
        del model.hf_device_map


def test_a_split_model_names_its_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {0: "GPU A", 1: "GPU A", 2: "GPU B"}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: names[device.index])
    devices = tuple(torch.device("cuda", index) for index in names)
    assert device_name(devices) == "2 x GPU A, GPU B"
    assert device_name(devices[:1]) == "GPU A"
    assert device_name((torch.device("cpu"),)) == "cpu"


SPECS = (
    TraceRequest(PROMPTS[0], tuple(SITES), "full", (TargetRequest(), TargetRequest(token=5))),
    TraceRequest(PROMPTS[5], ("resid", "neuron"), "token"),
    TraceRequest(PROMPTS[0], ("head", "embed"), "feature", rule="cp_lrp"),
    TraceRequest(PROMPTS[1], tuple(SITES), "full", rule="gradient"),
)


def layer_map(layers: int, first: Any, second: Any) -> dict[str, Any]:
    """The lower layers on one device, the upper ones and what follows on another."""
    places = {"model.embed_tokens": first, "model.rotary_emb": first}
    places |= {f"model.layers.{i}": first if i < layers // 2 else second for i in range(layers)}
    return places | {"model.norm": first, "lm_head": second}


def compute_on(loaded: LoadedModel, places: dict[str, Any], main: torch.device) -> None:
    """As dispatch_model does, which takes "cpu" for offloaded; here it computes."""
    from accelerate.hooks import attach_align_device_hook_on_blocks

    attach_align_device_hook_on_blocks(
        loaded.model, {"": main, **places}, offload=dict.fromkeys(places, False)
    )


@pytest.mark.parametrize("checkpointing", ["on", "off"])
@pytest.mark.parametrize("name", ["grouped", *FAMILY_RECIPES])
def test_accelerate_moves_tensors_and_changes_no_bit(
    checkpoints: Checkpoints, name: str, checkpointing: Any
) -> None:
    """
    Given a model in which accelerate has put its own forward around every module
    If jobs of every rule run
    I expect the rules to reach every module, the bits of the model without it, and the model
    to be left as it was.
    """
    from accelerate import dispatch_model

    folder = str(checkpoints.folder(name))
    plain = load_model(folder, dtype="float32", device="cpu")
    loaded = load_model(folder, dtype="float32", device_map={"": "cpu"})
    places = layer_map(loaded.shape.layers, "cpu", "cpu")
    dispatch_model(loaded.model, places, force_hooks=True)
    assert hasattr(loaded.model.get_submodule("model.norm"), "_hf_hook")
    attributes = {
        path: {key: id(value) for key, value in vars(module).items()}
        for path, module in loaded.model.named_modules()
    }
    for rule in RULES.values():
        verify_rule(loaded.model, rule)
    ours, wanted = (run(Engine(m, checkpointing), prepare(m, *SPECS)) for m in (loaded, plain))
    _assert_equal(ours, wanted)
    assert {
        path: {key: id(value) for key, value in vars(module).items()}
        for path, module in loaded.model.named_modules()
    } == attributes


def _assert_equal(ours: list[JobResult], wanted: list[JobResult], relative: float = 0.0) -> None:
    for left, right in zip(ours, wanted, strict=True):
        assert [t.token_id for t in left.targets] == [t.token_id for t in right.targets]
        for one, other in zip(left.tensors, right.tensors, strict=True):
            error = (one.values - other.values).abs().max()
            assert float(error) <= relative * float(other.values.abs().max()), one.site


class MetaAsDevice(TorchDispatchMode):
    """Let "meta" stand for a second device: what is copied from there arrives as zeros.

    Meta tensors have no values, but operations on tensors of two devices fail as they do on GPUs.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        aten = torch.ops.aten
        if func is aten._to_copy.default and args[0].is_meta:
            device = torch.device(kwargs.get("device") or "meta")
            if device.type != "meta":
                dtype = kwargs.get("dtype") or args[0].dtype
                return torch.zeros(args[0].shape, dtype=dtype, device=device)
        if func is aten.copy_.default and args[1].is_meta and not args[0].is_meta:
            return args[0].zero_()
        if func is aten._local_scalar_dense.default and args[0].is_meta:
            return 0
        return func(*args, **kwargs)


@pytest.mark.parametrize("devices", [("cpu", "meta"), ("meta", "cpu")])
@pytest.mark.parametrize("checkpointing", ["on", "off"])
@pytest.mark.parametrize("name", ["grouped", "qwen3", "gemma3"])
def test_no_operation_of_a_split_model_mixes_devices(
    checkpoints: Checkpoints, name: str, checkpointing: Any, devices: tuple[str, str]
) -> None:
    """
    Given a model whose layers are on two devices, and whose last norm is on the first again
    If jobs of every rule run
    I expect every operation to find its tensors on one device.
    """
    loaded = load_model(str(checkpoints.folder(name)), dtype="float32", device_map={"": "cpu"})
    first, second = map(torch.device, devices)
    places = layer_map(loaded.shape.layers, first, second)
    with MetaAsDevice():
        compute_on(loaded, places, second)
        split = replace(loaded, device=first)
        assert {device.type for device in split.devices} == {"cpu", "meta"}
        for rule in RULES.values():
            verify_rule(split.model, rule)
        results = run(Engine(split, checkpointing), prepare(loaded, *SPECS))
    assert len(results) == len(SPECS)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("checkpointing", ["on", "off"])
@pytest.mark.parametrize("name", ["grouped", *FAMILY_RECIPES])
def test_layers_on_two_devices_give_the_numbers_of_one(
    checkpoints: Checkpoints, name: str, checkpointing: Any
) -> None:
    """
    Given a model whose lower half computes on the CPU and whose upper half on a GPU
    If jobs of every rule run
    I expect the numbers of the CPU.
    """
    plain = checkpoints.loaded(name)
    loaded = load_model(str(checkpoints.folder(name)), dtype="float32", device_map={"": "cpu"})
    first, second = torch.device("cpu"), torch.device("cuda:0")
    compute_on(loaded, layer_map(loaded.shape.layers, first, second), second)
    assert {device.type for device in loaded.devices} == {"cpu", "cuda"}
    for rule in RULES.values():
        verify_rule(loaded.model, rule)
    ours, wanted = (run(Engine(m, checkpointing), prepare(m, *SPECS)) for m in (loaded, plain))
    _assert_equal(ours, wanted, 1e-4)


def test_a_mapping_over_the_cpu_loads(checkpoints: Checkpoints) -> None:
    folder: Path = checkpoints.folder("tied")
    loaded = load_model(str(folder), device_map={"": "cpu"})
    assert loaded.devices == (torch.device("cpu"),)
    assert loaded.dtype == torch.float32
    assert loaded.model.num_parameters() == checkpoints.loaded("tied").model.num_parameters()
