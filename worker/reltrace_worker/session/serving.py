"""Loads the models that a worker serves, and builds what runs jobs on them."""

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
import torch
from reltrace_proto.telemetry import Spans
from reltrace_proto.v1 import types_pb2

from reltrace_worker.config import Settings
from reltrace_worker.engine import Engine
from reltrace_worker.engine.parallel import Follower, LeadingEngine
from reltrace_worker.lrp import RULES, Rule, verify_rule
from reltrace_worker.lrp.joined import join_linear_layers
from reltrace_worker.lrp.lxt_rules import lxt_rules
from reltrace_worker.lrp.ops import compile_functions, is_compiled
from reltrace_worker.models import LoadedModel, load_model
from reltrace_worker.models.placement import device_memory, device_name
from reltrace_worker.models.sharding import Ranks
from reltrace_worker.observability.metrics import PassStats
from reltrace_worker.session.drafts import Drafts
from reltrace_worker.session.followers import Followers, Leader, join
from reltrace_worker.session.headers import model_info
from reltrace_worker.session.model_sources import ModelSource, check_name
from reltrace_worker.session.queue import RequestQueue
from reltrace_worker.session.routing import RoutingRunner
from reltrace_worker.session.runner import Runner
from reltrace_worker.session.watchdog import Watchdog
from reltrace_worker.types.errors import ModelError
from reltrace_worker.types.jobs import Target, Term, TokenizedPrompt, TraceJob
from reltrace_worker.types.results import JobResult

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Served:
    """Models that are loaded, and what runs jobs on them."""

    runner: RoutingRunner
    # What is announced of each model.
    infos: tuple[types_pb2.ModelInfo, ...]
    # Where the first one is, for people.
    device: str
    devices: tuple[torch.device, ...]
    # By model.
    stats: dict[str, PassStats]
    drafts: Drafts
    watchdog: Watchdog

    def memory(self) -> dict[str, int]:
        """Return bytes of device memory by kind."""
        return device_memory(self.devices)


@dataclass(frozen=True, slots=True)
class RuledModel:
    """A model in memory, and the rules that were shown to reach all of it."""

    model: LoadedModel
    rules: Mapping[str, Rule]


def load(
    sources: Sequence[ModelSource], settings: Settings, ranks: Ranks | None = None
) -> list[RuledModel]:
    """Load all models, or this rank's parts of them.

    Raises `ModelError`: a model can not be loaded, or two have one name.
    """
    if settings.compile == "on" and settings.rules == "lxt":
        raise ModelError("--compile on compiles the fused functions; it excludes --rules lxt")
    models: list[RuledModel] = []
    for source in sources:
        model = load_model(
            source.source,
            revision=source.revision,
            dtype=settings.dtype,
            device=settings.device,
            name=source.name,
            load_in_4bit=settings.load_in_4bit,
            context=settings.context_length,
            ranks=ranks,
        )
        check_name(model.name, [other.model.name for other in models])
        rules = RULES if settings.rules == "fused" else lxt_rules(model.family)
        _compile(settings, model)
        if model.device.type == "cuda":
            join_linear_layers(model.model)
            # The blocks of the weights that were apart.
            torch.cuda.empty_cache()
        _verify_rules(model, rules)
        log.info(
            "model.loaded", model=model.name, revision=model.revision, device=str(model.device)
        )
        models.append(RuledModel(model, rules))
    return models


def follow(sources: Sequence[ModelSource], settings: Settings, rank: int, folder: Path) -> None:
    """Compute with the rank 0 that started this process; ends with it."""
    leader = Leader()
    ranks = join(rank, settings.tensor_parallel, folder, settings.device)
    leader.follow(
        [
            Follower(found.model, rules=found.rules, receive=leader.receive)
            for found in load(sources, settings, ranks)
        ]
    )


def serve(
    sources: Sequence[ModelSource],
    settings: Settings,
    spans: Spans | None = None,
    followers: Followers | None = None,
    ranks: Ranks | None = None,
) -> Served:
    """Load all models, then plan what passes over each may take beside the weights of all.

    With `followers`, this process is rank 0 of `ranks`. Raises `ModelError`, as `load`.
    """
    models = load(sources, settings, ranks)
    # One thread for all: passes over different models take turns, as those over one do.
    engine_thread = ThreadPoolExecutor(1, "engine")
    drafts, watchdog = Drafts(), Watchdog()
    limit = None if settings.memory_gib is None else int(settings.memory_gib * 2**30)
    queues: list[RequestQueue] = []
    runners = []
    for index, found in enumerate(models):
        options: dict[str, Any] = {"rules": found.rules}
        arguments = found.model, settings.checkpointing, limit
        if followers is None:
            engine = Engine(*arguments, **options)
        else:
            options["commands"] = followers.of_model(index)
            engine = LeadingEngine(*arguments, **options)
        runners.append(
            _runner(found.model, engine, settings, engine_thread, spans, drafts, watchdog, queues)
        )
    if followers is not None:
        followers.on_lost = watchdog.lose
    infos = tuple(model_info(found.model) for found in models)
    routes = {
        route: runner
        for info, runner in zip(infos, runners, strict=True)
        for route in ("", info.name, f"{info.name}@{info.revision}")
        # A job may leave out the name of an only model.
        if route or len(infos) == 1
    }
    return Served(
        runner=RoutingRunner(routes),
        infos=infos,
        device=_device(models[0].model),
        # Of several ranks, the metrics have those of the first.
        devices=tuple(dict.fromkeys(found.model.device for found in models)),
        stats={found.model.name: r.stats for found, r in zip(models, runners, strict=True)},
        drafts=drafts,
        watchdog=watchdog,
    )


def _compile(settings: Settings, model: LoadedModel) -> None:
    """Compile the rules' functions, where that is asked for or was shown to pay."""
    if settings.compile == "off" or settings.rules == "lxt":
        return
    if settings.compile == "auto" and model.device.type != "cuda":
        return
    try:
        compile_functions(model.device, model.dtype)
    except ModelError as error:
        if settings.compile == "on":
            raise
        log.warning("rules.not_compiled", model=model.name, error=str(error))


def _compile_passes(engine: Engine, rules: Iterable[str]) -> None:
    """Run each rule once, so that no job waits for the compiler.

    Raises `ModelError`: a compiled function fails.
    """
    prompt = TokenizedPrompt((0, 0, 0), ("", "", ""))
    target = Target((Term(2, 0),))
    for rule in rules:
        (outcome,) = engine.run([TraceJob(prompt, (target,), ("resid",), rule=rule)])
        if not isinstance(outcome, JobResult):
            raise ModelError(
                f"rule {rule!r} fails when it is compiled; use --compile off: {outcome}"
            )


def _verify_rules(model: LoadedModel, rules: Mapping[str, Rule]) -> None:
    threads = torch.get_num_threads()
    # Probes of three tokens: threads that wait for each other take seconds where others compute.
    torch.set_num_threads(1)
    try:
        for rule in rules.values():
            verify_rule(model.model, rule)
    finally:
        torch.set_num_threads(threads)


def _device(model: LoadedModel) -> str:
    name, size = device_name(model.device), model.ranks.size
    return name if size == 1 else f"{size} x {name}"


def _runner(
    model: LoadedModel,
    engine: Engine,
    settings: Settings,
    engine_thread: ThreadPoolExecutor,
    spans: Spans | None,
    drafts: Drafts,
    watchdog: Watchdog,
    queues: list[RequestQueue],
) -> Runner:
    tokens = engine.token_budget() if settings.max_tokens == "auto" else int(settings.max_tokens)
    log.info(
        "memory.planned",
        model=model.name,
        tokens_per_pass=tokens,
        checkpointing=settings.checkpointing,
        products=engine.products,
    )
    if is_compiled():
        _compile_passes(engine, engine.rules)
    return Runner(
        model,
        engine,
        tokens,
        engine_thread,
        spans,
        drafts,
        watchdog,
        settings.pass_seconds,
        queues,
    )
