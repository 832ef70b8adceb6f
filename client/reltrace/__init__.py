"""Relevance traces of LLaMA-family language models: the Python SDK.

Start with `Client`:

>>> import reltrace
>>> with reltrace.Client("127.0.0.1:50051") as client:
...     trace = client.trace("I have 5 cats and 3 dogs. My cats love to play with my")
...     trace.relevance  # float32 [layers, tokens]
"""

from __future__ import annotations as _annotations

import logging as _logging
import os as _os
from collections.abc import Sequence as _Sequence
from importlib.metadata import version as _version
from os import PathLike as _PathLike
from typing import TYPE_CHECKING as _TYPE_CHECKING

# Before gRPC is imported: its fork handlers crash the child of a process that is in a call.
_os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

from reltrace_proto.net import TlsOptions

from reltrace.atlas.atlas import Atlas
from reltrace.atlas.examples import Context, Feature, SalientToken
from reltrace.atlas.search import FeatureMatch
from reltrace.client.async_client import AsyncClient
from reltrace.client.async_generate import AsyncTextStream
from reltrace.client.sync_client import Client, TextStream
from reltrace.evaluation.evaluation import Evaluation, RuleScore
from reltrace.types.edit import Edit, Steer
from reltrace.types.errors import (
    Cancelled,
    DeadlineExceeded,
    Failure,
    InvalidArgument,
    JobFailed,
    LostLease,
    MissingDependency,
    ModelNotFound,
    NotFound,
    PermissionDenied,
    ProtocolError,
    Quarantined,
    ResourceExhausted,
    StoreUnreadable,
    TraceError,
    Unavailable,
    Violation,
)
from reltrace.types.generation import Generation, TextPiece
from reltrace.types.neurons import StrongHead, StrongNeuron
from reltrace.types.provenance import Candidate, Provenance, ResolvedTarget, Timings
from reltrace.types.server_info import (
    JobStatus,
    Model,
    QuarantinedJob,
    Queue,
    Requeued,
    Status,
    Tenant,
    Worker,
)
from reltrace.types.target import Target
from reltrace.types.tokens import FirstTokenShare, Tokens, Turn
from reltrace.types.top_entries import Entry
from reltrace.types.trace import Trace

if _TYPE_CHECKING:
    from reltrace.batch.load import Batch as _Batch

__version__ = _version("reltrace")

# Warnings about unreachable servers go only to applications that add a handler to "reltrace".
_logging.getLogger("reltrace").addHandler(_logging.NullHandler())


def load_batch(folder: str | _PathLike[str], *, output_uri: str | _Sequence[str] = ()) -> _Batch:
    """Read a folder that `reltrace batch` wrote.

    Parameters
    ----------
    folder : path
        The folder.
    output_uri : str or sequence of str
        Further folders, as URLs, whose tensors may be read. Without it, only those in the batch's
        own ``output_uri``, if that is a folder of files, S3, Google or Azure.

    Returns
    -------
    Batch
        An iterable of `Trace`, each with its `id`, in the order of the prompts; with `len`,
        ``batch[i]``, ``.errors``, ``.manifest`` and ``.rows()``. Traces are read when asked for.

    Raises
    ------
    InvalidArgument
        If the folder holds no batch, or it is damaged.
    """
    from reltrace.batch.load import Batch

    return Batch(folder, output_uri)


def load_atlas(folder: str | _PathLike[str]) -> Atlas:
    """Read a folder that `Client.build_atlas` or `reltrace atlas build` wrote.

    Parameters
    ----------
    folder : path
        The folder.

    Returns
    -------
    Atlas
        With ``neuron(layer, index)``, ``head(layer, index)``, ``label(layer, index)``,
        ``find(text)``, ``save_page(path)`` and ``prompt(number)``.

    Raises
    ------
    InvalidArgument
        If the folder holds no atlas, or it is damaged.
    """
    return Atlas(folder)


__all__ = [
    "AsyncClient",
    "AsyncTextStream",
    "Atlas",
    "Cancelled",
    "Candidate",
    "Client",
    "Context",
    "DeadlineExceeded",
    "Edit",
    "Entry",
    "Evaluation",
    "Failure",
    "Feature",
    "FeatureMatch",
    "FirstTokenShare",
    "Generation",
    "InvalidArgument",
    "JobFailed",
    "JobStatus",
    "LostLease",
    "MissingDependency",
    "Model",
    "ModelNotFound",
    "NotFound",
    "PermissionDenied",
    "ProtocolError",
    "Provenance",
    "Quarantined",
    "QuarantinedJob",
    "Queue",
    "Requeued",
    "ResolvedTarget",
    "ResourceExhausted",
    "RuleScore",
    "SalientToken",
    "Status",
    "Steer",
    "StoreUnreadable",
    "StrongHead",
    "StrongNeuron",
    "Target",
    "Tenant",
    "TextPiece",
    "TextStream",
    "Timings",
    "TlsOptions",
    "Tokens",
    "Trace",
    "TraceError",
    "Turn",
    "Unavailable",
    "Violation",
    "Worker",
    "__version__",
    "load_atlas",
    "load_batch",
]
