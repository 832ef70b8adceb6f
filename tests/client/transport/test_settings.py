"""Tokens and TLS."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import pytest
import reltrace
from certificates import Certificates, make_certificates
from fake_server import FakeServer
from reltrace import TlsOptions
from typer.testing import CliRunner

TOKEN = "rlt_secret"
OTHER = "scheduler.example:50051"


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


def serving_tls(certificates: Certificates, *, mutual: bool = False) -> FakeServer:
    pair = (certificates.server_key.read_bytes(), certificates.server_cert.read_bytes())
    return FakeServer(
        credentials=grpc.ssl_server_credentials(
            [pair], certificates.ca.read_bytes() if mutual else None, mutual
        ),
        token=TOKEN,
    )


def test_every_call_presents_the_token(server: FakeServer) -> None:
    server.token = TOKEN
    with reltrace.Client(server.address, token=TOKEN) as client:
        client.trace("a b")
        client.models()
        client.status()
    assert len(server.presented) >= 5
    assert set(server.presented) == {f"Bearer {TOKEN}"}


@pytest.mark.parametrize("token", ["", "rlt_wrong"])
def test_a_wrong_token_is_an_error_of_ours_at_once(server: FakeServer, token: str) -> None:
    server.token = TOKEN
    with (
        reltrace.Client(server.address, token=token) as client,
        pytest.raises(reltrace.PermissionDenied, match="refuses: the token is not known"),
    ):
        client.trace("a b")
    assert len(server.presented) == 1


def test_a_token_from_the_environment(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "token"
    file.write_text("from-file\n")
    for variables, arguments, expected in (
        ({}, {}, ""),
        ({"RELTRACE_TOKEN": "from-variable"}, {}, "Bearer from-variable"),
        ({"RELTRACE_TOKEN_FILE": str(file)}, {}, "Bearer from-file"),
        ({"RELTRACE_TOKEN": "v"}, {"token": "argument"}, "Bearer argument"),
        ({"RELTRACE_TOKEN": "v"}, {"token": file}, "Bearer from-file"),
        ({"RELTRACE_TOKEN": "v"}, {"token": ""}, ""),
    ):
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            with reltrace.Client(server.address, **arguments) as client:  # type: ignore[arg-type]
                client.models()
        assert server.presented[-1] == expected


def test_a_token_file_is_read_again_when_it_changes(server: FakeServer, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("first")
    with reltrace.Client(server.address, token=file) as client:
        client.models()
        file.write_text("second\n")
        client.models()
        # Away for a moment, while it is replaced.
        file.unlink()
        client.models()
    assert server.presented == ["Bearer first", "Bearer second", "Bearer second"]


METHODS = ["SubmitJobs", "StreamResults", "AcknowledgeResults"]


@pytest.mark.parametrize("method", METHODS)
def test_a_token_that_is_replaced_during_a_call_is_presented_anew(
    server: FakeServer, tmp_path: Path, method: str
) -> None:
    file = tmp_path / "token"
    file.write_text("old")
    server.token = "old"

    def before(called: str) -> None:
        if called == method and server.token == "old":
            server.token = "new"
            file.write_text("new")

    server.before = before
    with reltrace.Client(server.address, token=file) as client:
        assert client.trace("a b").tokens == ["<s>", "a", "b"]
        server.wait_acknowledged()
    assert server.presented.count("Bearer old") == 1 + METHODS.index(method)

    # One that was not replaced is refused, once.
    server.token = "other"
    asked = len(server.presented)
    with (
        reltrace.Client(server.address, token=file) as client,
        pytest.raises(reltrace.PermissionDenied),
    ):
        client.models()
    assert len(server.presented) == asked + 1


@pytest.mark.parametrize("token", ["two words", "line\nbreak", "ümlaut", "nul\0"])
def test_a_token_that_can_not_be_sent_is_not_shown(token: str, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(token)
    for given in (token, file):
        with pytest.raises(reltrace.InvalidArgument, match=r"must (be|hold) one") as caught:
            reltrace.Client(token=given)
        assert token not in str(caught.value)


def test_token_files_that_hold_none(tmp_path: Path) -> None:
    with pytest.raises(reltrace.InvalidArgument, match=r"token: .*missing: No such file"):
        reltrace.Client(token=tmp_path / "missing")
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(reltrace.InvalidArgument, match="must hold one line"):
        reltrace.Client(token=tmp_path / "empty")
    with pytest.raises(reltrace.InvalidArgument, match="token: must be str or Path, not int"):
        reltrace.Client(token=3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "address",
    [OTHER, f"127.0.0.1:1,{OTHER}", "127.example.com:1", "10.0.0.1:1", f"dns:///{OTHER}"],
)
def test_a_token_is_not_sent_in_plaintext_to_another_machine(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in (reltrace.Client, reltrace.AsyncClient):
        with pytest.raises(reltrace.InvalidArgument, match="in plaintext: use TLS"):
            kind(address, token=TOKEN)
        with pytest.raises(reltrace.InvalidArgument, match="in plaintext: use TLS"):
            kind(address, token=TOKEN, tls=False)
        # Nothing to read, nobody to read it, or somebody said so.
        kind(address)
        kind(address, token=TOKEN, tls=True)
        kind(address, token=TOKEN, insecure=True)
    monkeypatch.setenv("RELTRACE_INSECURE", "1")
    reltrace.Client(address, token=TOKEN)
    for local in (
        "127.0.0.1:1",
        "127.9.9.9:1",
        "localhost:1",
        "[::1]:1",
        "unix:/x",
        "dns:///localhost:1",
    ):
        reltrace.Client(local, token=TOKEN, insecure=False)


def test_tls(certificates: Certificates, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving_tls(certificates) as server:
        with reltrace.Client(
            server.address, token=TOKEN, tls=TlsOptions(ca=certificates.ca)
        ) as client:
            assert client.trace("a b").tokens == ["<s>", "a", "b"]
        # The public authorities do not vouch for it, and plaintext is not spoken there.
        for tls, said in ((True, "certificate_verify_failed"), (False, "Does it ask for TLS")):
            with (
                reltrace.Client(server.address, token=TOKEN, tls=tls, retry_timeout=0) as client,
                pytest.raises(reltrace.Unavailable, match=f"(?i){said}"),
            ):
                client.models()
        monkeypatch.setenv("RELTRACE_TLS_CA", str(certificates.ca))
        for tls in (None, True):
            with reltrace.Client(server.address, token=TOKEN, tls=tls) as client:
                assert client.models()


def test_the_name_in_the_certificate_can_be_given(certificates: Certificates) -> None:
    with serving_tls(certificates) as server:
        for name, right in ((certificates.name, True), ("other.test", False)):
            tls = TlsOptions(ca=str(certificates.ca), server_name=name)
            with reltrace.Client(server.address, token=TOKEN, tls=tls, retry_timeout=0) as client:
                if right:
                    assert client.models()
                else:
                    with pytest.raises(reltrace.Unavailable):
                        client.models()


def test_mutual_tls(certificates: Certificates) -> None:
    with serving_tls(certificates, mutual=True) as server:
        mine = TlsOptions(certificates.ca, certificates.client_cert, certificates.client_key)
        with reltrace.Client(server.address, token=TOKEN, tls=mine) as client:
            assert client.models()
        nobody = TlsOptions(certificates.ca)
        with (
            reltrace.Client(server.address, token=TOKEN, tls=nobody, retry_timeout=0) as client,
            pytest.raises(reltrace.Unavailable),
        ):
            client.models()


def test_tls_options_that_can_not_be_used(
    certificates: Certificates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = tmp_path / "missing.pem"
    cases: list[tuple[Any, str]] = [
        (TlsOptions(ca=missing), f"tls.ca: {missing}: No such file"),
        (TlsOptions(ca=certificates.server_key), "tls.ca: .*holds no CERTIFICATE"),
        (
            TlsOptions(cert=certificates.client_cert),
            "tls.key: must be given together",
        ),
        (TlsOptions(key=certificates.client_key), "tls.cert: must be given together"),
        ("yes", "tls: must be True, False or TlsOptions, not str"),
    ]
    for tls, said in cases:
        with pytest.raises(reltrace.InvalidArgument, match=said):
            reltrace.Client(tls=tls)
    monkeypatch.setenv("RELTRACE_TLS", "perhaps")
    with pytest.raises(reltrace.InvalidArgument, match="RELTRACE_TLS: must be 1 or 0"):
        reltrace.Client()


def test_the_command_takes_the_options(certificates: Certificates, tmp_path: Path) -> None:
    from reltrace.cli.app import app

    token = tmp_path / "token"
    token.write_text(TOKEN)
    options = ["--token-file", str(token), "--tls-ca", str(certificates.ca)]
    with serving_tls(certificates) as server:
        for command in (["models"], ["status"], ["run", "a b"]):
            done = CliRunner().invoke(app, [*options, *command, "--server", server.address])
            assert done.exit_code == 0, done.output
        assert set(server.presented) == {f"Bearer {TOKEN}"}
    done = CliRunner().invoke(app, ["--token-file", str(token), "models", "--server", OTHER])
    assert isinstance(done.exception, reltrace.InvalidArgument)
    assert "in plaintext" in str(done.exception)
