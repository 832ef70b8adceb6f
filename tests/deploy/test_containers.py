"""The container files: pinned, rootless, and made of what is there."""

import fnmatch
import json
import re
import shlex
import tomllib

import pytest
from deploy.rendering import DEPLOY, ROOT, VARIABLES

FILES = sorted((DEPLOY / "containers").glob("*.Containerfile"))
COMPONENTS = {path.stem: path for path in FILES}
SCRIPTS = {
    "scheduler": "scheduler/pyproject.toml",
    "worker": "worker/pyproject.toml",
}
# What the worker's libraries and the system read, beside options.
SYSTEM = re.compile(r"PATH|HOME|PIP_\w+|PYTHON\w+|NVIDIA_DRIVER_CAPABILITIES")

Instruction = tuple[str, str]


def instructions(component: str) -> list[Instruction]:
    """The instructions in order, with continued lines joined and comments left out."""
    text = re.sub(r"^\s*#.*\n", "", COMPONENTS[component].read_text(), flags=re.MULTILINE)
    lines = [line.strip() for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in lines)]


def stages(component: str) -> list[list[Instruction]]:
    found: list[list[Instruction]] = []
    for instruction in instructions(component):
        if instruction[0] == "FROM":
            found.append([])
        found[-1].append(instruction)
    return found


def only(component: str, word: str) -> str:
    (value,) = [rest for name, rest in stages(component)[-1] if name == word]
    return value


def environment(component: str) -> dict[str, str]:
    return {
        name: value
        for word, rest in stages(component)[-1]
        if word == "ENV"
        for name, _, value in (pair.partition("=") for pair in shlex.split(rest))
    }


@pytest.fixture(params=sorted(SCRIPTS))
def component(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_there_is_one_for_each_command() -> None:
    assert set(COMPONENTS) == set(SCRIPTS)


def test_instructions_are_known(component: str) -> None:
    # No ADD, which unpacks and downloads what one does not see; no SHELL, ONBUILD, MAINTAINER.
    assert {word for word, _ in instructions(component)} <= {
        "FROM", "ARG", "ENV", "RUN", "WORKDIR", "COPY", "EXPOSE", "USER", "VOLUME",
        "HEALTHCHECK", "ENTRYPOINT",
    }  # fmt: skip


def test_bases_are_pinned_and_alike(component: str) -> None:
    bases = [rest.split()[0] for word, rest in instructions(component) if word == "FROM"]
    assert len(bases) == 2
    # The virtual environment of the first stage runs on the Python of the second.
    assert len(set(bases)) == 1
    assert re.fullmatch(r"[\w/.-]+:\d+\.\d+\.\d+-[\w.-]+", bases[0])
    lowest = tomllib.loads((ROOT / SCRIPTS[component]).read_text())["project"]["requires-python"]
    assert lowest == ">=3.11"
    assert bases[0].startswith("python:3.11.")


def test_they_run_as_nobody_special(component: str) -> None:
    user, _, group = only(component, "USER").partition(":")
    # A number, so that Kubernetes can see that it is not root.
    assert int(user) >= 10000
    assert int(group) >= 10000
    words = [word for word, _ in stages(component)[-1]]
    assert "RUN" not in words[words.index("USER") :]


def test_what_they_start_is_there(component: str) -> None:
    entry = json.loads(only(component, "ENTRYPOINT"))
    scripts = tomllib.loads((ROOT / SCRIPTS[component]).read_text())["project"]["scripts"]
    assert entry == [f"reltrace-{component}"]
    assert entry[0] in scripts
    check = only(component, "HEALTHCHECK")
    command = json.loads(check[check.index("CMD") + 3 :])
    assert command[:2] == ["python", "/opt/reltrace/health.py"]
    assert command[2] == {"scheduler": "ready", "worker": "worker"}[component]
    copied = [rest.split() for word, rest in stages(component)[-1] if word == "COPY"]
    assert ["deploy/containers/health.py", "/opt/reltrace/health.py"] in copied


def test_variables_are_options_of_the_commands(component: str) -> None:
    for name in environment(component):
        assert name in VARIABLES[component] or SYSTEM.fullmatch(name), name


def test_logs_are_for_machines(component: str) -> None:
    assert environment(component)["RELTRACE_LOG_FORMAT"] == "json"


def test_what_is_optional_is_there_if_a_variable_asks_for_it(component: str) -> None:
    (install,) = [
        rest for word, rest in stages(component)[0] if word == "RUN" and "/wheels/*.whl" in rest
    ]
    shared, own = (
        tomllib.loads((ROOT / file).read_text())["project"]["optional-dependencies"]
        for file in ("proto/pyproject.toml", SCRIPTS[component])
    )
    for requirement in shared["otel"] + own["s3"]:
        assert requirement.partition(">=")[0] in install.split()


def test_ports_are_those_that_are_served(component: str) -> None:
    variables = {"scheduler": ["RELTRACE_LISTEN", "RELTRACE_METRICS"]}
    served = [
        environment(component)[name].rpartition(":")[2]
        for name in variables.get(component, ["RELTRACE_WORKER_METRICS"])
    ]
    assert only(component, "EXPOSE").split() == served


def test_everything_is_installed_under_the_constraints(component: str) -> None:
    installs = [
        command
        for word, rest in instructions(component)
        if word == "RUN"
        for command in rest.split("&&")
        if re.search(r"\bpip (install|wheel)\b", command)
    ]
    assert installs
    for command in installs:
        # Without requirements nothing but what is named, or what lies there, is taken.
        local = "--no-deps" in command and not re.search(r"\slxt\s*$", command)
        assert local or "--constraint constraints.txt" in command, command
    assert environment_of_build(component)["PIP_NO_CACHE_DIR"] == "1"


def environment_of_build(component: str) -> dict[str, str]:
    return {
        name: value
        for word, rest in stages(component)[0]
        if word == "ENV"
        for name, _, value in (pair.partition("=") for pair in shlex.split(rest))
    }


def test_the_scheduler_has_no_torch() -> None:
    text = " ".join(rest for _, rest in instructions("scheduler"))
    assert "torch" not in text
    assert "./worker" not in text


def test_what_is_copied_exists_and_is_let_through(component: str) -> None:
    # The last rule that fits decides, as docker does it.
    rules = [
        line
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    sources = [
        source
        for word, rest in instructions(component)
        if word == "COPY" and "--from" not in rest
        for source in rest.split()[:-1]
    ]
    assert sources
    for source in sources:
        path = ROOT / source
        assert path.exists(), source
        inside = path if path.is_file() else path / "pyproject.toml"
        ignored = False
        parts = inside.relative_to(ROOT).parts
        names = ["/".join(parts[:depth]) for depth in range(1, len(parts) + 1)]
        for rule in rules:
            keep, pattern = rule.startswith("!"), rule.removeprefix("!")
            if any(fnmatch.fnmatchcase(name, pattern) for name in names):
                ignored = not keep
        assert not ignored, source


def test_no_secret_gets_into_an_image() -> None:
    rules = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in rules
    let_through = {rule[1:] for rule in rules if rule.startswith("!")}
    assert let_through == {
        "constraints.txt", "proto", "scheduler", "worker", "deploy", "deploy/containers",
    }  # fmt: skip
    # All of deploy is taken out again before its one folder is let in.
    assert rules.index("!deploy") < rules.index("deploy/*") < rules.index("!deploy/containers")
