"""Runs the build stage of a container file without containers: python check_install.py NAME.

Each RUN of the first stage runs in a fresh virtual environment, with the paths of the image below
a temporary folder; what was installed is then started. NAME is scheduler or worker. `--index` puts
another package index in the place of a build argument's.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
IMAGE_PATHS = re.compile(r"(?<![\w.~-])/(?=(?:opt/reltrace|wheels|lxt)\b)")
LAST = {
    "scheduler": ["import reltrace_scheduler.api.server", "import grpc_health.v1.health_pb2_grpc"],
    "worker": [
        "import reltrace_worker.lrp, reltrace_worker.engine, reltrace_worker.session.runner",
        "from reltrace_worker.demo import path; from reltrace_worker.models import load_model; "
        "load_model(str(path()))",
    ],
}


def instructions(path: Path) -> Iterator[tuple[str, str]]:
    """Give the instructions of the first stage, after its FROM."""
    text = re.sub(r"^\s*#.*\n", "", path.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    assert lines[0].startswith("FROM ")
    for line in lines[1:]:
        word, _, rest = line.partition(" ")
        if word == "FROM":
            return
        yield word, rest.strip()


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=sorted(LAST))
    parser.add_argument("--index", help="in the place of every build argument that is an index")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder)
        source = image / "src"
        source.mkdir()
        venv.create(image / "base", with_pip=True)
        environment = {
            name: value for name, value in os.environ.items() if name not in {"PYTHONPATH"}
        }
        environment["PATH"] = f"{image}/base/bin:{environment['PATH']}"
        for word, rest in instructions(
            ROOT / "deploy" / "containers" / f"{options.name}.Containerfile"
        ):
            match word:
                case "ARG" | "ENV":
                    for pair in rest.split():
                        key, _, value = pair.partition("=")
                        is_index = word == "ARG" and options.index
                        environment[key] = options.index if is_index else value
                case "COPY":
                    what, where = rest.split()
                    if (ROOT / what).is_dir():
                        shutil.copytree(ROOT / what, source / where)
                    else:
                        shutil.copy(ROOT / what, source / where)
                case "RUN":
                    command = IMAGE_PATHS.sub(f"{image}/", rest)
                    print(f"RUN {rest}", flush=True)
                    subprocess.run(["sh", "-c", command], cwd=source, env=environment, check=True)
                case "WORKDIR":
                    assert rest == "/src", rest
                case _:
                    raise NotImplementedError(word)
        installed = image / "opt" / "reltrace" / "bin"
        # Away from the sources: what is imported is what was installed.
        for code in LAST[options.name]:
            subprocess.run([installed / "python", "-c", code], cwd=image, check=True)
        subprocess.run(
            [installed / f"reltrace-{options.name}", "--help"],
            cwd=image,
            check=True,
            stdout=subprocess.DEVNULL,
        )
        size = sum(path.stat().st_size for path in image.glob("opt/**/*") if path.is_file())
        packages = subprocess.run(
            [installed / "python", "-m", "pip", "list", "--format=freeze"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
        print(f"{options.name}: {len(packages)} packages, {size / 2**20:.0f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
