"""Connections to servers: addresses, security, calls, submissions and their results."""
