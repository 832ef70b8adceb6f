"""Addresses, tokens and TLS files."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from certificates import Certificates, make_certificates
from reltrace_proto.net import (
    Credentials,
    FileValue,
    SettingError,
    TlsOptions,
    host_and_port,
    is_loopback,
    parse_addresses,
    token_from_environment,
)

TOKEN = "rlt_secret"
OTHER = "scheduler.example:50051"
LOCAL = ("127.0.0.1:1", "127.9.9.9:1", "localhost:1", "[::1]:1", "unix:/x", "dns:///localhost:1")


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


@pytest.mark.parametrize(
    ("text", "addresses"),
    [
        ("h:1", ["h:1"]),
        ("h:1, g:2,h:1", ["h:1", "g:2"]),
        ("[::1]:5", ["[::1]:5"]),
        ("dns:///h:1,g:2", ["dns:///h:1", "g:2"]),
        ("dns://8.8.8.8:53/h:1", ["dns://8.8.8.8:53/h:1"]),
        ("unix:/a/b.sock", ["unix:/a/b.sock"]),
    ],
)
def test_addresses(text: str, addresses: list[str]) -> None:
    assert parse_addresses(text) == tuple(addresses)


@pytest.mark.parametrize(
    "text",
    [
        "", "h", "h:x", "h:0", "h:65536", ":1", "a:1,,b:2", "dns:///h", "dns:///:1", "http://h:1",
        "h:1,g", ",",
    ],
)  # fmt: skip
def test_malformed_addresses(text: str) -> None:
    with pytest.raises(SettingError, match='address: must be "HOST:PORT"'):
        parse_addresses(text)


def test_an_address_to_listen_on() -> None:
    assert host_and_port("--web", "127.0.0.1:0") == ("127.0.0.1", 0)
    assert host_and_port("--web", "[::1]:80") == ("::1", 80)
    for address in ("nowhere", "127.0.0.1:x", ":1"):
        with pytest.raises(SettingError, match=f"--web {address}: must be HOST:PORT"):
            host_and_port("--web", address)


def test_too_many_addresses() -> None:
    with pytest.raises(SettingError, match="address: names 65 servers; at most 64"):
        parse_addresses(",".join(f"h:{port}" for port in range(1, 66)))


def test_loopback() -> None:
    assert all(map(is_loopback, LOCAL))
    others = ("0.0.0.0:1", "[::]:1", "10.1.2.3:1", "no-such-host.invalid:1", ":1", "127.example:1")
    assert not any(map(is_loopback, others))


@pytest.mark.parametrize(
    "address",
    [OTHER, f"127.0.0.1:1,{OTHER}", "127.example.com:1", "10.0.0.1:1", f"dns:///{OTHER}"],
)
def test_a_token_is_not_sent_in_plaintext_to_another_machine(address: str) -> None:
    addresses = parse_addresses(address)
    with pytest.raises(SettingError, match="in plaintext: use TLS") as caught:
        Credentials(TOKEN).check(*addresses)
    assert TOKEN not in str(caught.value)
    # Nothing to read, nobody to read it, or the user allows it.
    Credentials().check(*addresses)
    Credentials(TOKEN, TlsOptions()).check(*addresses)
    Credentials(TOKEN, insecure=True).check(*addresses)
    Credentials(TOKEN).check(*LOCAL)


def test_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "token"
    file.write_text("from-file\n")
    assert Credentials().metadata() == ()
    assert Credentials(" word ").metadata() == (("authorization", "Bearer word"),)
    for variable, value in (("RELTRACE_TOKEN", "t"), ("RELTRACE_TOKEN_FILE", str(file))):
        monkeypatch.setenv(variable, value)
        ((_, presented),) = Credentials(token_from_environment()).metadata()
        assert presented == ("Bearer t" if variable == "RELTRACE_TOKEN" else "Bearer from-file")


def test_files_that_can_not_be_used(certificates: Certificates, tmp_path: Path) -> None:
    missing, empty, odd, binary = (tmp_path / name for name in ("missing", "empty", "odd", "bin"))
    empty.write_text("\n")
    odd.write_text("two words")
    binary.write_bytes(b"\xff\xff")
    cases: tuple[tuple[str | Path, TlsOptions | None, str], ...] = (
        (missing, None, f"token: {missing}: No such file"),
        (empty, None, f"token: {empty}: must hold one line"),
        (odd, None, f"token: {odd}: must be one word"),
        (binary, None, f"token: {binary}: is not text"),
        ("two words", None, "token: must be one word"),
        ("", TlsOptions(ca=missing), f"tls.ca: {missing}: No such file"),
        ("", TlsOptions(ca=certificates.server_key), "holds no CERTIFICATE"),
        ("", TlsOptions(cert=certificates.client_cert), "tls.key: must be given together"),
        ("", TlsOptions(key=certificates.client_key), "tls.cert: must be given together"),
    )
    for token, tls, message in cases:
        with pytest.raises(SettingError, match=re.escape(message)) as caught:
            Credentials(token, tls)
        assert "two words" not in str(caught.value)


def test_files_are_read_again_when_they_change(tmp_path: Path) -> None:
    """
    Given a file that is replaced, by nonsense, by nothing and by a good one again
    I expect the last good value to stay in use, and one report of each failure.
    """
    file = tmp_path / "number"
    file.write_text("1")
    failures: list[OSError | ValueError] = []
    number = FileValue(lambda: int(file.read_text()), [file], failures.append)
    assert (number.value, number.refresh()) == (1, False)
    file.write_text("nonsense")
    assert [number.refresh() for _ in range(2)] == [False, False]
    file.unlink()
    assert [number.refresh() for _ in range(2)] == [False, False]
    assert [type(error) for error in failures] == [ValueError, FileNotFoundError]
    assert number.value == 1
    file.write_text("2")
    assert number.refresh()
    assert number.value == 2


def test_it_needs_nothing_that_only_some_systems_or_installations_have() -> None:
    missing = ("fcntl", "termios", "resource", "structlog", "opentelemetry")
    program = f"import sys; sys.modules.update(dict.fromkeys({missing})); import reltrace_proto.net"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
