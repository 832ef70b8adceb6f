"""Authentication, roles, rates and TLS."""
