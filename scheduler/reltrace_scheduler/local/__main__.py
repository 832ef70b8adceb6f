"""`python -m reltrace_scheduler.local`: the command `reltrace up`."""

from reltrace_scheduler.local.command import main

if __name__ == "__main__":
    main()
