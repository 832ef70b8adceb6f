"""The whole service on one machine: `reltrace up`, and a Redis of the scheduler's own."""
