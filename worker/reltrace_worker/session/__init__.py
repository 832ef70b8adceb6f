"""The gRPC side of a worker: leases, heartbeats, uploads."""
