"""Checks the edits of a job against what the model's workers announced."""

import struct
from collections.abc import Iterator

from reltrace_proto.v1 import types_pb2

from reltrace_scheduler.errors import Violation
from reltrace_scheduler.limits import MAX_EDIT, MAX_EDITED_FEATURES, MAX_EDITS_PER_JOB

_WITHOUT_LAYERS = "embed"
_ALLOWED = f"allowed: {-MAX_EDIT:g} to {MAX_EDIT:g}"


def edit_faults(spec: types_pb2.JobSpec, model: types_pb2.ModelInfo) -> Iterator[Violation]:
    """Yield what is wrong with the edits of a job; positions are its worker's to check."""
    if len(spec.edits) > MAX_EDITS_PER_JOB:
        yield Violation("edits", f"has {len(spec.edits)}; at most {MAX_EDITS_PER_JOB} are allowed")
        return
    features = sum(len(edit.features) + len(edit.positions) for edit in spec.edits)
    if features > MAX_EDITED_FEATURES:
        yield Violation(
            "edits",
            f"name {features} features and positions; at most {MAX_EDITED_FEATURES} are allowed",
        )
    for index, edit in enumerate(spec.edits):
        yield from (fault.within(f"edits[{index}]") for fault in _faults(edit, model))


def _faults(edit: types_pb2.Edit, model: types_pb2.ModelInfo) -> Iterator[Violation]:
    if edit.site not in model.sites:
        yield Violation("site", f"{edit.site!r} is not one of {', '.join(model.sites)}")
        return
    layers = 1 if edit.site == _WITHOUT_LAYERS else model.layers
    if edit.layer >= layers:
        yield Violation("layer", f"{edit.layer} is not in 0..{layers - 1} of {edit.site}")
    width = {"head": model.heads, "neuron": model.intermediate_size}.get(
        edit.site, model.hidden_size
    )
    bad = next((i for i, feature in enumerate(edit.features) if feature >= width), None)
    if bad is not None:
        yield Violation(
            f"features[{bad}]",
            f"{edit.features[bad]} is not in 0..{width - 1} of {edit.site}",
        )
    match edit.WhichOneof("change"):
        case "value" | "scale" as change:
            number = getattr(edit, change)
            if not abs(number) <= MAX_EDIT:
                yield Violation(change, f"is {number:g}; {_ALLOWED}")
        case "direction":
            yield from _direction_faults(edit, width)
        case "mean" if edit.mean:
            if edit.site != _WITHOUT_LAYERS:
                yield Violation("mean", f"is for the site {_WITHOUT_LAYERS}, not {edit.site}")
            if edit.features:
                yield Violation("features", "is not for the mean, which is set as a whole")
        case _:
            yield Violation("change", "is missing: give a value, a scale, a direction or the mean")


def _direction_faults(edit: types_pb2.Edit, width: int) -> Iterator[Violation]:
    if edit.site == "head":
        yield Violation("direction", "is not for heads: use value or scale")
    elif len(edit.direction) != 4 * width:
        values, rest = divmod(len(edit.direction), 4)
        size = f"{len(edit.direction)} bytes" if rest else f"{values} values"
        yield Violation(
            "direction", f"has {size}; {edit.site} has {width} features, each a float32"
        )
    else:
        numbers = (number for (number,) in struct.iter_unpack("<f", edit.direction))
        bad = next((n for n in numbers if not abs(n) <= MAX_EDIT), None)
        if bad is not None:
            yield Violation("direction", f"has a number that is {bad:g}; {_ALLOWED}")
    if edit.features:
        yield Violation("features", "is not for a direction, which has a value for every one")
