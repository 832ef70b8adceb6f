"""What holds for all tests."""

import os
import signal

# As `import reltrace` sets it; gRPC reads it when it is imported, which another test may do first.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

# A shell in the background has the first ignored, nohup the second, and so have their children: the
# commands that tests run.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
