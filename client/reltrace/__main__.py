"""`python -m reltrace`: the `reltrace` command."""

from reltrace.cli.app import main

if __name__ == "__main__":
    main()
