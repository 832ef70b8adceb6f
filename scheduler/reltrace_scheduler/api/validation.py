"""Checks of what a client submits, against what the model's workers announced.

What only the tokenizer can tell (is the prompt too long, is the target one token) is
checked by the worker; the job then fails with the same kind of violations.
"""

from collections.abc import Iterable, Iterator, Sequence

from reltrace_proto.v1 import trace_pb2, types_pb2

from reltrace_scheduler.api.edits import edit_faults
from reltrace_scheduler.api.models import Models
from reltrace_scheduler.api.result_store import is_inside
from reltrace_scheduler.config import (
    MAX_ATLAS_PLACES,
    MAX_CORPUS_PROMPTS,
    MAX_JOBS_PER_REQUEST,
    MAX_MESSAGES,
    MAX_NEW_TOKENS,
    MAX_PROMPT_BYTES,
    MAX_ROLE,
    MAX_TARGETS_PER_JOB,
    MAX_TEMPERATURE,
)
from reltrace_scheduler.errors import (
    InvalidRequestError,
    NotFoundError,
    UnavailableError,
    Violation,
)
from reltrace_scheduler.records import NewJob

_RESULT_DTYPES = {
    types_pb2.SCALAR_TYPE_UNSPECIFIED,
    types_pb2.SCALAR_TYPE_FLOAT32,
    types_pb2.SCALAR_TYPE_BFLOAT16,
    types_pb2.SCALAR_TYPE_FLOAT16,
}
_MAX_KEY = 128

# Corpora and chats are inputs, and checked with them.
_CAPABILITIES = (
    "edits",
    "edits.mean",
    "forward_only",
    "generation",
    "generation.stream",
    "add_special_tokens",
    "tokenize_only",
)

# Redis counts milliseconds; nobody waits longer than a month.
_MIN_TIMEOUT, _MAX_TIMEOUT = 0.001, 31 * 24 * 3600


def check_submission(
    request: trace_pb2.SubmitJobsRequest, models: Models, output_uris: Sequence[str] = ()
) -> list[NewJob]:
    """Check a request and return its jobs.

    Parameters
    ----------
    output_uris : sequence of str
        Folders that workers may be told to write to.

    Raises
    ------
    InvalidRequestError
        With one violation per fault, ``jobs[3].prompt`` and the like; also where a model is named
        without a revision while several of its revisions are served.
    NotFoundError
        No worker has ever served a model that is named.
    UnavailableError
        No worker has connected yet, so that no model is known.
    """
    if len(request.idempotency_key) > _MAX_KEY:
        raise InvalidRequestError(
            Violation("idempotency_key", f"is longer than {_MAX_KEY} characters")
        )
    if request.priority not in types_pb2.Priority.values():
        raise InvalidRequestError(Violation("priority", "is not one of interactive, batch"))
    if not request.jobs:
        raise InvalidRequestError(Violation("jobs", "is empty; send at least one job"))
    if len(request.jobs) > MAX_JOBS_PER_REQUEST:
        raise InvalidRequestError(
            Violation(
                "jobs", f"has {len(request.jobs)} jobs; at most {MAX_JOBS_PER_REQUEST} are allowed"
            )
        )
    if not models.known:
        raise UnavailableError("no worker has connected yet, so no model is served; try again")
    unknown = [
        Violation(f"jobs[{index}].model", fault)
        for index, job in enumerate(request.jobs)
        if (fault := _model_fault(job.model, models))
    ]
    if unknown:
        raise NotFoundError(*unknown)
    routes = [job.model or models.default or "" for job in request.jobs]
    # Which revision would run such a job is chance, and may differ from the next job's.
    several = {route: fault for route in set(routes) if (fault := _revision_fault(route, models))}
    if several:
        raise InvalidRequestError(
            *(
                Violation(f"jobs[{index}].model", several[route])
                for index, route in enumerate(routes)
                if route in several
            )
        )
    infos = {route: models.info(route) for route in set(routes)}
    jobs, violations = [], []
    # The jobs of a message mostly differ in their input only.
    sound: set[bytes] = set()
    for index, (spec, route) in enumerate(zip(request.jobs, routes, strict=True)):
        model = infos[route]
        faults = [*_input_faults(spec, model), *_position_faults(spec)]
        settings = _settings(spec)
        if settings not in sound:
            found = [*_settings_faults(spec, model), *_output_faults(spec, output_uris)]
            faults += found
            if not found:
                sound.add(settings)
        if faults:
            violations += [Violation(f"jobs[{index}].{v.field}", v.description) for v in faults]
            continue
        jobs.append((spec, route))
    if violations:
        raise InvalidRequestError(*violations)
    # Only now, for a request that is refused is looked at once more.
    return [_new_job(spec, route) for spec, route in jobs]


def check_job_ids(job_ids: Sequence[str]) -> None:
    """Check how many jobs a request names.

    Raises
    ------
    InvalidRequestError
        They are more than one request may name.
    """
    if len(job_ids) > MAX_JOBS_PER_REQUEST:
        raise InvalidRequestError(
            Violation("job_ids", f"names more than {MAX_JOBS_PER_REQUEST} jobs")
        )


def _model_fault(name: str, models: Models) -> str:
    if name in models.known or (not name and models.default):
        return ""
    served = ", ".join(models.names(models.workers) or models.names(models.known))
    base = name.partition("@")[0]
    if name != base and base in models.known:
        return f"{name!r} is not served; served: {', '.join(models.revisions(base)) or served}"
    if not name:
        return f"is empty, and several models are served: {served}"
    return f"{name!r} is not served; served: {served}"


def _revision_fault(route: str, models: Models) -> str:
    revisions = models.revisions(route)
    if len(revisions) < 2:
        return ""
    return (
        f"{route!r} is served in {len(revisions)} revisions; ask for one of them as "
        f"NAME@REVISION: {', '.join(revisions)}"
    )


def _output_faults(spec: types_pb2.JobSpec, allowed: Sequence[str]) -> Iterator[Violation]:
    if not spec.output_uri or is_inside(spec.output_uri, allowed):
        return
    folders = ", ".join(allowed) or "none (the operator names them by --output-uri)"
    yield Violation("output_uri", f"{spec.output_uri!r} is in no folder allowed here: {folders}")


def as_sent(spec: types_pb2.JobSpec) -> bytes:
    """Return what a job is, whichever span it belongs to."""
    if not spec.traceparent:
        return spec.SerializeToString()
    # Who repeats a submission may do so within another span.
    without = types_pb2.JobSpec()
    without.CopyFrom(spec)
    without.ClearField("traceparent")
    return without.SerializeToString()


def _new_job(spec: types_pb2.JobSpec, route: str) -> NewJob:
    sent = as_sent(spec)
    timeout = spec.timeout.ToTimedelta().total_seconds() if spec.HasField("timeout") else 0.0
    if spec.model == route and not spec.traceparent:
        return NewJob(route, sent, timeout)
    spec.model = route
    return NewJob(route, spec.SerializeToString(), timeout, sent)


def _settings(spec: types_pb2.JobSpec) -> bytes:
    """Everything of a job but its input."""
    settings = types_pb2.JobSpec()
    settings.CopyFrom(spec)
    for name in ("prompt", "input_ids", "corpus", "chat"):
        settings.ClearField(name)
    return settings.SerializeToString(deterministic=True)


def _settings_faults(spec: types_pb2.JobSpec, model: types_pb2.ModelInfo) -> Iterator[Violation]:
    if spec.forward_only and spec.sites:
        yield Violation("sites", "needs a backward pass, and forward_only excludes it")
    for name in _CAPABILITIES:
        if _asks_for(spec, name):
            yield from _capability_faults(name, name, model)
    yield from edit_faults(spec, model)
    yield from _generation_faults(spec, model)
    if spec.tokenize_only:
        for name in ("sites", "targets", "edits", "forward_only", "output_uri"):
            if getattr(spec, name):
                yield Violation(name, "is for a trace, and the job asks for tokens only")
        if spec.HasField("generation"):
            yield Violation("generation", "writes tokens, and the job asks for those it has")
    for index, site in enumerate(spec.sites):
        if site not in model.sites:
            yield Violation(f"sites[{index}]", _not_among(site, model.sites))
        elif site in spec.sites[:index]:
            yield Violation(f"sites[{index}]", f"{site!r} is named twice")
    if spec.rule and spec.rule not in model.rules:
        yield Violation("rule", _not_among(spec.rule, model.rules))
    if spec.reduction and spec.reduction not in model.reductions:
        yield Violation("reduction", _not_among(spec.reduction, model.reductions))
    if (
        spec.HasField("timeout")
        and not _MIN_TIMEOUT <= spec.timeout.seconds + (spec.timeout.nanos / 1e9) <= _MAX_TIMEOUT
    ):
        yield Violation(
            "timeout", f"must be {_MIN_TIMEOUT} to {_MAX_TIMEOUT} s; leave it out for none"
        )
    if spec.dtype not in _RESULT_DTYPES:
        yield Violation("dtype", "is not one of float32, bfloat16, float16")
    if len(spec.targets) > MAX_TARGETS_PER_JOB:
        yield Violation(
            "targets", f"has {len(spec.targets)}; at most {MAX_TARGETS_PER_JOB} are allowed"
        )
    for index, target in enumerate(spec.targets):
        for fault in _target_faults(target, model):
            yield Violation(f"targets[{index}].{fault.field}", fault.description)


def _asks_for(spec: types_pb2.JobSpec, name: str) -> bool:
    match name:
        case "edits.mean":
            return any(edit.mean for edit in spec.edits)
        case "generation":
            return spec.HasField("generation")
        case "generation.stream":
            return spec.generation.stream
        case "add_special_tokens":
            # Any worker adds them.
            return spec.HasField(name) and not spec.add_special_tokens
    return bool(getattr(spec, name))


def _generation_faults(spec: types_pb2.JobSpec, model: types_pb2.ModelInfo) -> Iterator[Violation]:
    if not spec.HasField("generation"):
        return
    asked = spec.generation
    most = min(MAX_NEW_TOKENS, model.context_length)
    if not 1 <= asked.max_new_tokens <= most:
        yield Violation("generation.max_new_tokens", f"{asked.max_new_tokens} is not in 1..{most}")
    if not 0 <= asked.temperature <= MAX_TEMPERATURE:
        yield Violation(
            "generation.temperature", f"must be 0 to {MAX_TEMPERATURE}, not {asked.temperature}"
        )
    if not 0 <= asked.top_p <= 1:
        yield Violation("generation.top_p", f"must be 0 to 1, not {asked.top_p}")
    for name in ("sites", "targets", "forward_only", "output_uri"):
        if getattr(spec, name):
            yield Violation(name, "is for a trace, and the job asks for a generation")


def _input_faults(spec: types_pb2.JobSpec, model: types_pb2.ModelInfo) -> Iterator[Violation]:
    match spec.WhichOneof("input"):
        case "prompt":
            if not spec.prompt:
                yield Violation("prompt", "is empty")
            elif (size := len(spec.prompt.encode())) > MAX_PROMPT_BYTES:
                yield Violation(
                    "prompt", f"is {size} bytes long; at most {MAX_PROMPT_BYTES} are allowed"
                )
        case "input_ids":
            ids = spec.input_ids.ids
            if not ids:
                yield Violation("input_ids", "is empty")
            elif len(ids) > model.context_length:
                yield Violation(
                    "input_ids",
                    f"has {len(ids)} tokens; {model.name} takes at most {model.context_length}",
                )
            bad = next((i for i, token in enumerate(ids) if token >= model.vocab_size), None)
            if bad is not None:
                yield Violation(f"input_ids[{bad}]", _out_of_range(ids[bad], model))
        case "corpus":
            yield from _corpus_faults(spec, model)
        case "chat":
            yield from _capability_faults("messages", "chat", model)
            yield from _chat_faults(spec.chat, "messages")
        case _:
            yield Violation("prompt", "is missing: give a prompt, messages or input_ids")


def _capability_faults(
    field: str, capability: str, model: types_pb2.ModelInfo
) -> Iterator[Violation]:
    if capability not in model.capabilities:
        yield Violation(field, f"is more than the workers of {model.name} can do")


def _chat_faults(chat: types_pb2.Chat, field: str) -> Iterator[Violation]:
    count = len(chat.messages)
    if not 1 <= count <= MAX_MESSAGES:
        yield Violation(field, f"are {count}; allowed: 1 to {MAX_MESSAGES}")
        return
    size = sum(len(message.content.encode()) for message in chat.messages)
    if size > MAX_PROMPT_BYTES:
        yield Violation(field, f"are {size} bytes long; at most {MAX_PROMPT_BYTES} are allowed")
    for index, message in enumerate(chat.messages):
        if not 1 <= len(message.role) <= MAX_ROLE:
            yield Violation(
                f"{field}[{index}].role",
                f"has {len(message.role)} characters; allowed: 1 to {MAX_ROLE}, as the model's "
                "chat template knows it (system, user, assistant)",
            )


def _corpus_faults(spec: types_pb2.JobSpec, model: types_pb2.ModelInfo) -> Iterator[Violation]:
    yield from _capability_faults("corpus", "corpus", model)
    asked = spec.corpus
    if asked.chats:
        yield from _capability_faults("corpus.chats", "chat", model)
    if asked.positions or asked.keep_special:
        yield from _capability_faults("corpus.positions", "corpus.positions", model)
    if asked.positions and spec.targets:
        yield Violation("targets", "are the prompts' own next tokens, by corpus.positions")
    if asked.seed and not asked.positions:
        yield Violation("corpus.seed", "draws corpus.positions, and none is asked for")
    count = len(asked.prompts)
    for number, chat in sorted(asked.chats.items()):
        place = f"corpus.chats[{number}]"
        if number >= count or asked.prompts[number]:
            yield Violation(place, f"takes the place of an empty prompt; there are {count} prompts")
        yield from _chat_faults(chat, f"{place}.messages")
    if not 1 <= count <= MAX_CORPUS_PROMPTS:
        yield Violation("corpus.prompts", f"are {count}; allowed: 1 to {MAX_CORPUS_PROMPTS}")
    if not 1 <= spec.top_k <= MAX_ATLAS_PLACES:
        yield Violation("top_k", f"is {spec.top_k}; of an atlas, allowed: 1 to {MAX_ATLAS_PLACES}")
    if len(spec.targets) > 1:
        yield Violation("targets", "has several; of an atlas there is one")
    for name in ("sites", "reduction", "layers", "forward_only", "output_uri"):
        if getattr(spec, name):
            yield Violation(name, "is not for an atlas")
    if spec.HasField("generation"):
        yield Violation("generation", "is not for an atlas")
    if spec.tokenize_only:
        yield Violation("tokenize_only", "is not for an atlas")


def _target_faults(target: types_pb2.Target, model: types_pb2.ModelInfo) -> Iterator[Violation]:
    for field in ("token", "contrast"):
        if target.HasField(field):
            ref: types_pb2.TokenRef = getattr(target, field)
            match ref.WhichOneof("token"):
                case "id" if ref.id >= model.vocab_size:
                    yield Violation(field, _out_of_range(ref.id, model))
                case "text" if not ref.text:
                    yield Violation(field, "is empty text")
                case None:
                    yield Violation(field, "names no token: give its text or its id")
    if target.HasField("continuation"):
        others = [f for f in ("token", "contrast", "position") if target.HasField(f)]
        if others:
            yield Violation("continuation", f"can not be combined with {', '.join(others)}")
        match target.continuation.WhichOneof("tokens"):
            case "ids":
                ids = target.continuation.ids.ids
                bad = next((token for token in ids if token >= model.vocab_size), None)
                if bad is not None:
                    yield Violation("continuation", _out_of_range(bad, model))
                if not ids:
                    yield Violation("continuation", "is empty")
            case "text" if not target.continuation.text:
                yield Violation("continuation", "is empty")
            case None:
                yield Violation("continuation", "names no tokens: give their text or their ids")


def _position_faults(spec: types_pb2.JobSpec) -> Iterator[Violation]:
    length = len(spec.input_ids.ids)
    for index, target in enumerate(spec.targets):
        if length and target.HasField("position") and not -length <= target.position < length:
            yield Violation(
                f"targets[{index}].position",
                f"{target.position} is outside of the {length} tokens of input_ids",
            )


def _out_of_range(token: int, model: types_pb2.ModelInfo) -> str:
    return f"token id {token} is not in 0..{model.vocab_size - 1} of {model.name}"


def _not_among(name: str, allowed: Iterable[str]) -> str:
    return f"{name!r} is not one of {', '.join(allowed)}"
