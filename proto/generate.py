"""Generate the stubs in `reltrace_proto/v1` from the `.proto` files in `reltrace/v1`.

Run by `make proto`; `tests/proto` runs it into an empty folder and compares.
The stubs are checked in, so that installing needs no compiler.
"""

import os
import re
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc

HERE = Path(__file__).parent
PACKAGE = "reltrace_proto.v1"


def generate(out: Path) -> None:
    """Write `*_pb2.py`, `*_pb2.pyi`, `*_pb2_grpc.py` and `*_pb2_grpc.pyi` into `out`."""
    sources = sorted(str(p.relative_to(HERE)) for p in HERE.glob("reltrace/v1/*.proto"))
    # protoc looks for the mypy plug-ins on the PATH; they are installed beside Python.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with tempfile.TemporaryDirectory() as scratch:
        arguments = [
            "protoc",
            f"-I{HERE}",
            f"-I{files('grpc_tools') / '_proto'}",
            f"--python_out={scratch}",
            f"--mypy_out={scratch}",
            f"--grpc_python_out={scratch}",
            f"--mypy_grpc_out={scratch}",
            *sources,
        ]
        if protoc.main(arguments) != 0:
            sys.exit("protoc failed")
        for stub in sorted(Path(scratch, "reltrace/v1").iterdir()):
            # A file without a service still gets an empty gRPC stub.
            if "_pb2_grpc" in stub.name and "Stub" not in stub.read_text():
                continue
            (out / stub.name).write_text(_relocate(stub.read_text()))


def _relocate(stub: str) -> str:
    # protoc derives Python modules from the proto package, and `reltrace` is the
    # client's import name; the stubs live in a package of their own.
    return re.sub(r"\breltrace\.v1(?= import |\.\w+_pb2\b)", PACKAGE, stub)


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "reltrace_proto" / "v1")
