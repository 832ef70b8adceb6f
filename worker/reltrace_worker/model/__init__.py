"""Loading a model, and checking and tokenizing jobs for it."""

from reltrace_worker.model.families import FAMILIES, Family
from reltrace_worker.model.loading import LoadedModel, ModelDescription, ModelShape, load_model
from reltrace_worker.model.preparing import JobPreparer

__all__ = [
    "FAMILIES",
    "Family",
    "JobPreparer",
    "LoadedModel",
    "ModelDescription",
    "ModelShape",
    "load_model",
]
