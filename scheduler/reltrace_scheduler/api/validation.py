"""Checks of a submission against the models that workers announced, and of lists of jobs."""

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

from google.protobuf.message import Message
from reltrace_proto.stores import is_below
from reltrace_proto.v1 import trace_pb2, types_pb2

from reltrace_scheduler import __version__
from reltrace_scheduler.api.job_faults import input_faults, settings_faults
from reltrace_scheduler.api.models import Models
from reltrace_scheduler.api.result_sizes import ResultLimits, ResultSize
from reltrace_scheduler.errors import (
    InvalidRequestError,
    NotFoundError,
    UnavailableError,
    Violation,
    invalid,
)
from reltrace_scheduler.limits import MAX_JOBS_PER_REQUEST, MAX_KEY
from reltrace_scheduler.records import NewJob

_NESTED: tuple[Literal["chat", "corpus"], ...] = ("chat", "corpus")
_INPUTS = ("prompt", "input_ids", *_NESTED)


def check_submission(
    request: trace_pb2.SubmitJobsRequest,
    models: Models,
    results: ResultLimits,
    output_uris: Sequence[str] = (),
) -> list[NewJob]:
    """Return the jobs of a request, or raise a RequestError with one violation per fault.

    `output_uris` are the folders that workers may be told to write to.
    """
    if fault := next(_request_faults(request), None):
        raise InvalidRequestError(fault)
    if not models.known:
        raise UnavailableError("no worker has connected yet, so no model is served; try again")
    names = [job.model for job in request.jobs]
    if unknown := _model_violations(names, _unknown_model, models):
        raise NotFoundError(*unknown)
    routes = [name or models.default or "" for name in names]
    if ambiguous := _model_violations(routes, _ambiguous_revision, models):
        raise InvalidRequestError(*ambiguous)
    infos = {route: models.info(route) for route in set(routes)}
    violations: list[Violation] = []
    # The jobs of a message mostly differ in their input only.
    checked: set[bytes] = set()
    sizes: list[int] = []
    known_sizes: dict[tuple[bytes, str | None, int], ResultSize] = {}
    for index, (spec, route) in enumerate(zip(request.jobs, routes, strict=True)):
        faults = list(input_faults(spec, infos[route]))
        without_input = _without(spec, *_INPUTS)
        settings = without_input.SerializeToString(deterministic=True)
        faults += _unknown_fields(*(getattr(spec, x) for x in _NESTED if spec.HasField(x)))
        if settings not in checked:
            found = [
                *settings_faults(spec, infos[route]),
                *_output_faults(spec, output_uris),
                *_unknown_fields(without_input),
            ]
            faults += found
            if not found:
                checked.add(settings)
        if not faults:
            # Of a text and of ids, only the length matters.
            kind, length = spec.WhichOneof("input"), len(spec.prompt.encode())
            alike = (settings, kind, length or len(spec.input_ids.ids))
            size = known_sizes.get(alike) or results.size(spec, infos[route])
            if kind not in _NESTED:
                known_sizes[alike] = size
            sizes.append(size.bytes)
            faults += [size.fault] if size.fault else []
        violations += [fault.within(f"jobs[{index}]") for fault in faults]
    if violations:
        raise InvalidRequestError(*violations)
    # Only now: this changes the jobs, and a request that is refused is looked at once more.
    return [
        _new_job(spec, route, size)
        for spec, route, size in zip(request.jobs, routes, sizes, strict=True)
    ]


def check_job_ids(job_ids: Sequence[str]) -> None:
    """Raise an error if a request names too many jobs."""
    if len(job_ids) > MAX_JOBS_PER_REQUEST:
        raise invalid("job_ids", f"names more than {MAX_JOBS_PER_REQUEST} jobs")


def as_sent(spec: types_pb2.JobSpec) -> bytes:
    """Return a serialized job without its span: sent again, it may belong to another span."""
    return (_without(spec, "traceparent") if spec.traceparent else spec).SerializeToString()


def _request_faults(request: trace_pb2.SubmitJobsRequest) -> Iterator[Violation]:
    count = len(request.jobs)
    if len(request.idempotency_key) > MAX_KEY:
        yield Violation("idempotency_key", f"is longer than {MAX_KEY} characters")
    if request.priority not in types_pb2.Priority.values():
        yield Violation("priority", "is not one of interactive, batch")
    if not count:
        yield Violation("jobs", "is empty; send at least one job")
    if count > MAX_JOBS_PER_REQUEST:
        yield Violation("jobs", f"has {count} jobs; at most {MAX_JOBS_PER_REQUEST} are allowed")


def _model_violations(
    names: Sequence[str], fault_of: Callable[[str, Models], str], models: Models
) -> list[Violation]:
    faults = {name: fault_of(name, models) for name in set(names)}
    return [
        Violation(f"jobs[{index}].model", faults[name])
        for index, name in enumerate(names)
        if faults[name]
    ]


def _unknown_model(name: str, models: Models) -> str:
    if name in models.known or (not name and models.default):
        return ""
    served = ", ".join(models.served)
    if not name:
        return f"is empty, and several models are served: {served}"
    base = name.partition("@")[0]
    if name != base and base in models.known:
        served = ", ".join(models.revisions(base)) or served
    return f"{name!r} is not served; served: {served}"


def _ambiguous_revision(route: str, models: Models) -> str:
    # Which revision would run such a job is chance, and may differ from the next job's.
    revisions = models.revisions(route)
    if len(revisions) < 2:
        return ""
    return (
        f"{route!r} is served in {len(revisions)} revisions; ask for one of them as "
        f"NAME@REVISION: {', '.join(revisions)}"
    )


def _output_faults(spec: types_pb2.JobSpec, allowed: Sequence[str]) -> Iterator[Violation]:
    if spec.output_uri and not is_below(spec.output_uri, allowed):
        folders = ", ".join(allowed) or "none (the operator names them by --output-uri)"
        fault = f"{spec.output_uri!r} is in no folder allowed here: {folders}"
        if any(spec.output_uri.startswith(f"{folder}/") for folder in allowed):
            fault = (
                f"{spec.output_uri!r} is not below {folders} by plain names: no empty ones, no .., "
                'and none with any of \\?#%*[]{}|<>" or ::'
            )
        yield Violation("output_uri", fault)


def _unknown_fields(*parts: Message) -> Iterator[Violation]:
    """Find what a newer client asks for, which would be left out without a word."""
    for part in parts:
        known = type(part)()
        known.CopyFrom(part)
        known.DiscardUnknownFields()
        if known.ByteSize() != part.ByteSize():
            fault = (
                f"has fields that this scheduler (reltrace {__version__}) does not know: the "
                "client is newer; update the schedulers before the clients"
            )
            yield Violation("", fault)


def _new_job(spec: types_pb2.JobSpec, route: str, result_bytes: int) -> NewJob:
    sent = as_sent(spec)
    timeout = spec.timeout.ToTimedelta().total_seconds() if spec.HasField("timeout") else 0.0
    if spec.model == route and not spec.traceparent:
        return NewJob(route, sent, timeout, result_bytes=result_bytes)
    spec.model = route
    return NewJob(route, spec.SerializeToString(), timeout, sent, result_bytes)


def _without(spec: types_pb2.JobSpec, *fields: str) -> types_pb2.JobSpec:
    copy = types_pb2.JobSpec()
    copy.CopyFrom(spec)
    for name in fields:
        copy.ClearField(name)  # type: ignore[arg-type]
    return copy
