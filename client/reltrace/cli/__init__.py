"""The `reltrace` command, one module per group of commands."""
