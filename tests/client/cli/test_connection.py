"""Where the settings of a connection come from."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from cli.conftest import Run
from damage import damaged_toml, damages
from fake_server import FakeServer
from hypothesis import given

CONFIG = """
profile = "lab"

[profiles.lab]
server = "lab:50051"
token_file = "lab.token"
tls_ca = "ca.pem"

[profiles.home]
server = "home:50051"
tls = false
insecure = true
"""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in list(os.environ):
        if name.startswith("RELTRACE_"):
            monkeypatch.delenv(name)
    path = tmp_path / "config.toml"
    path.write_text(CONFIG)
    monkeypatch.setenv("RELTRACE_CONFIG", str(path))
    return path


def shown(command: Run, *arguments: str) -> dict[str, tuple[str, str]]:
    code, out, err = command(*arguments, "config", "--json")
    assert (code, err) == (0, "")
    settings = json.loads(out)["settings"]
    return {name: (found["value"], found["source"]) for name, found in settings.items()}


def test_the_default_profile(command: Run, config: Path) -> None:
    """Its files are named from the folder of the configuration file."""
    assert shown(command) == {
        "server": ("lab:50051", "profile lab"),
        "token_file": (str(config.parent / "lab.token"), "profile lab"),
        "tls_ca": (str(config.parent / "ca.pem"), "profile lab"),
    }


def test_the_default_profile_is_not_for_another_server(
    command: Run, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its token would be sent to another server."""
    assert shown(command, "--server", "other:1") == {"server": ("other:1", "option")}
    monkeypatch.setenv("RELTRACE_SERVER", "third:1")
    assert shown(command) == {"server": ("third:1", "environment")}
    # A profile that is asked for is used beside it.
    assert shown(command, "--server", "other:1", "--profile", "home") == {
        "server": ("other:1", "option"),
        "tls": ("False", "profile home"),
        "insecure": ("True", "profile home"),
    }


@pytest.mark.usefixtures("config")
def test_order_of_precedence(command: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """An option, then a profile by option, then the environment, then a profile by variable."""
    monkeypatch.setenv("RELTRACE_SERVER", "third:1")
    monkeypatch.setenv("RELTRACE_PROFILE", "home")
    assert shown(command)["server"] == ("third:1", "environment")
    assert shown(command)["insecure"] == ("True", "profile home")
    assert shown(command, "--profile", "home")["server"] == ("home:50051", "profile home")
    assert shown(command, "--profile", "lab")["server"] == ("lab:50051", "profile lab")
    assert shown(command, "--profile", "lab", "--server", "a:1")["server"] == ("a:1", "option")
    # One token: that of what wins.
    monkeypatch.setenv("RELTRACE_TOKEN", "secret")
    found = shown(command, "--profile", "lab")
    assert found["token_file"][1] == "profile lab"
    assert "token" not in found
    assert "token_file" not in shown(command, "--profile", "home")
    assert shown(command, "--profile", "home")["token"] == ("****", "environment")


def test_the_token_is_not_shown(
    command: Run, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RELTRACE_TOKEN", "geheim")
    code, out, _ = command("config")
    assert code == 0
    assert "geheim" not in out
    assert "****" in out
    assert str(config) in out.replace("\n", "")
    assert "profile: lab" in out


@pytest.mark.usefixtures("config")
def test_options_stand_before_or_after_the_command(command: Run) -> None:
    for arguments in (
        ("--server", "a:1", "--tls-ca", "x.pem", "config", "--json"),
        ("--server", "a:1", "config", "--tls-ca", "x.pem", "--json"),
        ("--server", "b:1", "--tls-ca", "x.pem", "config", "--server", "a:1", "--json"),
    ):
        settings = json.loads(command(*arguments)[1])["settings"]
        assert {name: found["value"] for name, found in settings.items()} == {
            "server": "a:1", "tls_ca": "x.pem",
        }  # fmt: skip


def test_a_command_connects_with_its_settings(
    command: Run, config: Path, server: FakeServer
) -> None:
    token = config.parent / "the.token"
    token.write_text("secret-1")
    place = ("--server", server.address)
    for arguments in (
        (*place, "--token-file", str(token), "models"),
        ("models", *place, "--token-file", str(token)),
        (*place, "tenants", "--token-file", str(token), "list"),
        ("workers", *place, "--token-file", str(token), "drain", "w1"),
    ):
        assert command(*arguments)[0] == 0, arguments
    assert set(server.presented) == {"Bearer secret-1"}


ERRORS: dict[str, Any] = {
    "profile = ": "config: {}: Invalid value",
    'server = "a:1"': "{}: server: is not known; allowed: profile, profiles",
    "profile = 3": "{}: profile: must be a text, not 3",
    "profiles = 3": "{}: profiles: must be a table, not 3",
    "[profiles]\nlab = 3": "{}: profiles.lab: must be a table, not 3",
    "[profiles.lab]\nserfer = 'a:1'": "{}: profiles.lab.serfer: is not known; allowed: server, ",
    "[profiles.lab]\ntoken = 'a'": "{}: profiles.lab.token: is not known; allowed: server, ",
    "[profiles.lab]\ntls = 'yes'": "{}: profiles.lab.tls: must be true or false, not 'yes'",
    "profile = 'lab'": "profile: 'lab' is not in {}; profiles there: none",
    "profile = 'lab'\n[profiles.a]\n[profiles.b]": (
        "profile: 'lab' is not in {}; profiles there: a, b"
    ),
}


@pytest.mark.parametrize("content", ERRORS)
def test_a_file_that_can_not_be_used(command: Run, config: Path, content: str) -> None:
    config.write_text(content)
    code, _, err = command("config")
    assert code == 1
    assert err.startswith("reltrace: " + ERRORS[content].format(config))
    assert err.count("\n") == 1


def test_a_missing_file(
    command: Run, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = tmp_path / "missing.toml"
    code, _, err = command("--config", str(missing), "config")
    assert (code, err) == (1, f"reltrace: config: {missing}: No such file or directory\n")
    monkeypatch.delenv("RELTRACE_CONFIG")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "empty"))
    assert shown(command) == {"server": ("127.0.0.1:50051", "default")}
    assert "(does not exist)" in command("config")[1].replace("\n", " ")


@pytest.mark.usefixtures("config")
def test_a_switch_is_on_or_off(command: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RELTRACE_TLS", "perhaps")
    code, _, err = command("config")
    assert (code, err) == (1, "reltrace: RELTRACE_TLS: must be 1 or 0, not 'perhaps'\n")


@damages
@given(content=damaged_toml(CONFIG))
def test_a_damaged_file_is_settings_or_an_error_that_names_it(
    command: Run, config: Path, content: bytes
) -> None:
    config.write_bytes(content)
    code, _, error = command("config", "--json")
    assert code in (0, 1)
    assert (code == 0) == (not error)
    assert error.startswith("reltrace: ") == bool(error)
    assert error.count("\n") <= 1
