"""Jobs in, results out: checking, passes, generation and atlases; pure torch, without gRPC."""

from reltrace_worker.engine.engine import Checkpointing, Engine
from reltrace_worker.engine.preparing import JobPreparer
from reltrace_worker.engine.reductions import REDUCTIONS
from reltrace_worker.engine.sites import SITES
from reltrace_worker.engine.sizes import result_bytes

__all__ = ["REDUCTIONS", "SITES", "Checkpointing", "Engine", "JobPreparer", "result_bytes"]
