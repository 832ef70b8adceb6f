"""Loading a model, and checking and tokenizing jobs for it."""

from reltrace_worker.models.families import FAMILIES, Family
from reltrace_worker.models.loading import LoadedModel, ModelShape, load_model
from reltrace_worker.models.preparing import JobPreparer

__all__ = [
    "FAMILIES",
    "Family",
    "JobPreparer",
    "LoadedModel",
    "ModelShape",
    "load_model",
]
