"""The scheduler of reltrace: gRPC in front of Redis Streams."""

__version__ = "0.1.0"
