"""Traces in safetensors files: tensors by name, and everything else as JSON."""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np

from reltrace.storage.atomic_files import replace_file
from reltrace.storage.damaged_files import check_kinds, named_if_damaged
from reltrace.storage.stored_arrays import StoredArrays, StoredLocation
from reltrace.storage.tensor_files import write_tensors
from reltrace.types.arrays import Array
from reltrace.types.errors import invalid
from reltrace.types.provenance import Candidate, Provenance, ResolvedTarget
from reltrace.types.tokens import Turn
from reltrace.types.trace import Trace

_FORMAT = "reltrace-trace-1"
_KINDS: dict[str, type | tuple[type, ...]] = {
    "id": (int, str, NoneType),
    **dict.fromkeys(("tokens", "token_ids", "offsets", "turns", "hints"), list),
    **dict.fromkeys(("special_positions", "layers"), list),
    "text": str,
    "target": dict,
    "provenance": dict,
}


def describe(trace: Trace) -> dict[str, Any]:
    """Return everything of a trace but its tensors, as JSON holds it.

    A logit that is not finite, which JSON does not know, becomes None.
    """
    target = asdict(trace.target)
    if not math.isfinite(trace.target.logit):
        target["logit"] = None
    return {
        "id": trace.id,
        "tokens": trace.tokens,
        "token_ids": trace.token_ids,
        "text": trace.text,
        "offsets": trace.offsets.tolist(),
        "turns": [asdict(turn) for turn in trace.turns],
        "hints": list(trace.hints),
        "special_positions": list(trace.special_positions),
        "layers": list(trace.layers),
        "target": target,
        "provenance": {**asdict(trace.provenance), "versions": dict(trace.provenance.versions)},
    }


def to_dict(trace: Trace) -> dict[str, Any]:
    about = describe(trace)
    about["target"]["candidates"] = [one._asdict() for one in trace.target.candidates]
    relevance = {
        site: _plain(parts[""])
        if set(parts) == {""}
        else {part: _plain(array) for part, array in parts.items()}
        for site, parts in trace.arrays.items()
    }
    return {**about, "relevance": relevance}


def _plain(values: Any) -> Any:
    if np.isfinite(values).all():
        return values.tolist()
    boxed = np.asarray(values, dtype=object)
    boxed[~np.isfinite(values)] = None
    return boxed.tolist()


def split(trace: Trace, *, copy_stored: bool) -> tuple[dict[str, Any], dict[str, Array]]:
    """Return a trace as JSON, with the order of its tensors, and the tensors.

    Of tensors that are in a store the location is enough, unless `copy_stored`.
    """
    about = describe(trace)
    tensors: dict[str, Array] = {}
    if isinstance(trace.arrays, StoredArrays) and not copy_stored:
        about |= {"stored": asdict(trace.arrays.location), "sites": list(trace.arrays)}
    else:
        tensors = tensors_of(trace)
    return {**about, "order": list(tensors)}, tensors


def tensors_of(trace: Trace) -> dict[str, Array]:
    """Return the tensors of a trace by name: the site, or "site/part" where it has parts."""
    return {
        f"{site}/{part}" if part else site: np.ascontiguousarray(array)
        for site, parts in trace.arrays.items()
        for part, array in parts.items()
    }


def restore(
    about: Mapping[str, Any], tensors: Mapping[str, Array], stored_in: Sequence[str] = ()
) -> Trace:
    """Return the trace that `split` took apart; `stored_in` are folders that may have its tensors.

    Raises any error if something is missing or of another form, StoreUnreadable if the tensors are
    in another folder.
    """
    check_kinds(about, _KINDS)
    arrays: Mapping[str, Mapping[str, Array]]
    if "stored" in about:
        location = StoredLocation.from_json(about["stored"])
        location.check(stored_in, "the batch's own output_uri and that given to load_batch")
        arrays = StoredArrays(location, about["sites"])
    else:
        by_site: dict[str, dict[str, Array]] = {}
        for name, array in tensors.items():
            site, _, part = name.partition("/")
            by_site.setdefault(site, {})[part] = array
        arrays = by_site
    target = dict(about["target"])
    target["continuation_ids"] = tuple(target["continuation_ids"])
    target["candidates"] = tuple(Candidate(*one) for one in target.get("candidates", ()))
    if target["logit"] is None:
        target["logit"] = float("nan")
    return Trace(
        tokens=about["tokens"],
        token_ids=about["token_ids"],
        target=ResolvedTarget(**target),
        provenance=Provenance(**about["provenance"]),
        arrays=arrays,
        id=about["id"],
        # Older files do not say what follows.
        layers=tuple(about.get("layers", ())),
        text=about.get("text", ""),
        offsets=np.array(about.get("offsets", ()), np.int64).reshape(-1, 2),
        turns=tuple(Turn(**turn) for turn in about.get("turns", ())),
        hints=tuple(about.get("hints", ())),
        special_positions=tuple(about.get("special_positions", ())),
    )


def save(trace: Trace, path: Path) -> Path:
    about, tensors = split(trace, copy_stored=True)
    metadata = {"format": _FORMAT, "trace": json.dumps(about)}
    # Of its own: several processes may save to one path.
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with replace_file(path, durable=False, unfinished=unfinished) as file:
        write_tensors(file, tensors, metadata)
    return path


def load(path: Path) -> Trace:
    from safetensors import safe_open

    if not path.is_file():
        raise FileNotFoundError(f"there is no file {os.fspath(path)!r}")
    with named_if_damaged(path, "not a trace that Trace.save wrote"):
        with safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise invalid("path", f"{os.fspath(path)!r} was not written by Trace.save")
            about = json.loads(metadata["trace"])
            tensors = {name: file.get_tensor(name) for name in about["order"]}
        return restore(about, tensors)
