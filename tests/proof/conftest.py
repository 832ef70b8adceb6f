"""The service that the end-to-end tests have, and real models."""

from e2e.conftest import demo_address
from reference.real_models import real_models

__all__ = ["demo_address", "real_models"]
