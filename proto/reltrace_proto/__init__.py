"""The wire of reltrace: stubs generated from `reltrace/v1/*.proto`."""
