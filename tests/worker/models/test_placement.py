"""Where weights go: one device, parts on several, or four bits; what is missing is named."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from reference.checkpoints import FAMILY_RECIPES
from reference.loaded import PROMPTS, Checkpoints, prepare, run
from reltrace_proto.v1 import types_pb2
from reltrace_worker.engine import SITES, Engine
from reltrace_worker.lrp import RULES, verify_rule
from reltrace_worker.models import load_model, placement
from reltrace_worker.models.placement import choose_placement
from reltrace_worker.models.sharding import Ranks
from reltrace_worker.session.headers import model_info
from reltrace_worker.types.errors import ModelError
from reltrace_worker.types.jobs import TargetRequest, TraceRequest
from reltrace_worker.types.results import JobResult


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
        ({"load_in_4bit": True}, "needs a CUDA device; this model would be on 'cpu'"),
        ({"load_in_4bit": True, "device": "cpu"}, "needs a CUDA device"),
    ],
)
def test_what_is_missing_is_named(
    checkpoints: Checkpoints, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        load_model(str(checkpoints.folder("plain")), **options)


@pytest.mark.usefixtures("with_packages")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cuda:0"}, "takes the first GPUs; it excludes 'cuda:0'"),
        ({"device": "cuda"}, r"--tensor-parallel 2 needs as many GPUs; torch .* sees 1"),
        ({"device": "cuda", "load_in_4bit": True}, "in four bits are not divided"),
    ],
)
def test_what_tensor_parallelism_excludes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        choose_placement(**{"dtype": "auto", "ranks": Ranks(0, 2)} | options)


def test_every_rank_has_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loaded on the host, because a GPU may not hold the whole model."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for rank in range(2):
        placed = choose_placement("auto", "auto", ranks=Ranks(rank, 2))
        assert placed.device == torch.device("cuda", rank)
        assert placed.options == {"dtype": torch.bfloat16}


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
    # Weight by weight to the device.
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
    wider = choose_placement("auto", "float32", load_in_4bit=True).options
    assert wider["dtype"] == torch.float32
    assert wider["quantization_config"].bnb_4bit_compute_dtype == torch.float32


SPECS = (
    TraceRequest(PROMPTS[0], tuple(SITES), "full", (TargetRequest(), TargetRequest(token=5))),
    TraceRequest(PROMPTS[5], ("resid", "neuron"), "token"),
    TraceRequest(PROMPTS[0], ("head", "embed"), "feature", rule="cp_lrp"),
    TraceRequest(PROMPTS[1], tuple(SITES), "full", rule="gradient"),
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
    plain, loaded = (load_model(folder, dtype="float32", device="cpu") for _ in range(2))
    # As accelerate does with weights in four bits.
    dispatch_model(loaded.model, {"": "cpu"}, main_device="cpu", force_hooks=True)
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
