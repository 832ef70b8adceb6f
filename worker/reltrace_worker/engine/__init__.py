"""A packed batch in, relevance tensors out: pure torch, usable and tested without gRPC."""

from reltrace_worker.engine.engine import Checkpointing, Engine
from reltrace_worker.engine.preparing import JobPreparer
from reltrace_worker.engine.reductions import REDUCTIONS
from reltrace_worker.engine.sites import SITES

__all__ = ["REDUCTIONS", "SITES", "Checkpointing", "Engine", "JobPreparer"]
