"""Loading a model, and checking and tokenizing jobs for it."""

from reltrace_worker.models.families import FAMILIES, Family
from reltrace_worker.models.loading import LoadedModel, ModelShape, load_model

__all__ = [
    "FAMILIES",
    "Family",
    "LoadedModel",
    "ModelShape",
    "load_model",
]
