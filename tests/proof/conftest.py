"""The service that the end-to-end tests have."""

from e2e.conftest import demo_address

__all__ = ["demo_address"]
