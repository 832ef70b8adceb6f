"""`python -m reltrace`: the `reltrace` command."""

from reltrace._command.app import main

if __name__ == "__main__":
    main()
