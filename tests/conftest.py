"""What holds for all tests."""

import os

# As `import reltrace` sets it; gRPC reads it when it is imported, which another test may do first.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
