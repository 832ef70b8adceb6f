"""A read-only page of the cluster, for people."""
