"""TLS, mutual TLS, and which addresses need them."""

import shutil
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from certificates import Certificates
from reltrace_proto.net import SettingError
from reltrace_proto.v1 import trace_pb2, trace_pb2_grpc
from reltrace_scheduler.auth.access import Access
from reltrace_scheduler.auth.tls import ServerTls
from reltrace_scheduler.auth.tokens import Tokens
from reltrace_scheduler.errors import StartError
from scheduler.auth.conftest import Serve


def trusting(
    certificates: Certificates, mine: Certificates | None = None
) -> grpc.ChannelCredentials:
    """Trust one authority; present a certificate of another."""
    return grpc.ssl_channel_credentials(
        certificates.ca.read_bytes(),
        mine.client_key.read_bytes() if mine else None,
        mine.client_cert.read_bytes() if mine else None,
    )


async def ask(address: str, credentials: grpc.ChannelCredentials | None) -> grpc.StatusCode:
    channel = (
        grpc.aio.insecure_channel(address)
        if credentials is None
        else grpc.aio.secure_channel(address, credentials)
    )
    async with channel:
        try:
            await trace_pb2_grpc.TraceServiceStub(channel).ListModels(
                trace_pb2.ListModelsRequest(), timeout=10
            )
        except grpc.aio.AioRpcError as error:
            return error.code()
    return grpc.StatusCode.OK


def files(folder: Path, certificates: Certificates) -> ServerTls:
    """Copy a server's files, to be replaced later."""
    shutil.copy(certificates.server_cert, folder / "cert.pem")
    shutil.copy(certificates.server_key, folder / "key.pem")
    return ServerTls(folder / "cert.pem", folder / "key.pem")


async def test_tls(
    serve: Serve, certificates: Certificates, other_certificates: Certificates
) -> None:
    tls = ServerTls(certificates.server_cert, certificates.server_key)
    async with serve(Access(tls=tls)) as address:
        assert await ask(address, trusting(certificates)) is grpc.StatusCode.OK
        assert await ask(address, trusting(other_certificates)) is grpc.StatusCode.UNAVAILABLE
        assert await ask(address, None) is grpc.StatusCode.UNAVAILABLE


async def test_mutual_tls(
    serve: Serve, certificates: Certificates, other_certificates: Certificates
) -> None:
    tls = ServerTls(certificates.server_cert, certificates.server_key, certificates.ca)
    async with serve(Access(tls=tls)) as address:
        assert await ask(address, trusting(certificates, certificates)) is grpc.StatusCode.OK
        for mine in (None, other_certificates):
            assert await ask(address, trusting(certificates, mine)) is grpc.StatusCode.UNAVAILABLE


async def test_new_certificates_are_served_without_a_restart(
    serve: Serve, certificates: Certificates, other_certificates: Certificates, tmp_path: Path
) -> None:
    tls = files(tmp_path, certificates)
    async with serve(Access(tls=tls)) as address:
        assert await ask(address, trusting(certificates)) is grpc.StatusCode.OK

        # Half of the pair, then nonsense, then nothing: the old ones stay.
        shutil.copy(other_certificates.server_cert, tls.cert)
        assert await ask(address, trusting(certificates)) is grpc.StatusCode.OK
        tls.cert.write_text("nonsense")
        assert await ask(address, trusting(certificates)) is grpc.StatusCode.OK
        tls.cert.unlink()
        assert await ask(address, trusting(certificates)) is grpc.StatusCode.OK

        files(tmp_path, other_certificates)
        assert await ask(address, trusting(other_certificates)) is grpc.StatusCode.OK
        assert await ask(address, trusting(certificates)) is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("field", ["cert", "key", "client_ca"])
def test_files_that_are_missing_or_of_another_kind(
    field: str, certificates: Certificates, tmp_path: Path
) -> None:
    paths = {
        "cert": certificates.server_cert,
        "key": certificates.server_key,
        "client_ca": certificates.ca,
    }
    with pytest.raises(SettingError, match=r"missing.pem: No such file"):
        ServerTls(**paths | {field: tmp_path / "missing.pem"}).credentials()
    wrong = certificates.ca if field == "key" else certificates.server_key
    with pytest.raises(SettingError, match=f"{wrong}: holds no"):
        ServerTls(**paths | {field: wrong}).credentials()


def test_other_machines_need_tls_and_tokens(
    certificates: Certificates, token_file: Path, tokens: dict[str, str]
) -> None:
    tls = ServerTls(certificates.server_cert, certificates.server_key)
    known = Tokens(token_file)
    for access, lacking in (
        (Access(), "add --tls-cert and --tls-key and --tokens, listen"),
        (Access(tokens=known), "add --tls-cert and --tls-key, listen"),
        (Access(tls=tls), "add --tokens, listen"),
    ):
        with pytest.raises(StartError, match=lacking):
            access.check("0.0.0.0:50051")
        access.check("127.0.0.1:50051")
    Access(tokens=known, tls=tls).check("0.0.0.0:50051")
    Access(insecure=True).check("0.0.0.0:50051")


def test_other_machines_read_metrics_only_if_that_is_said(
    certificates: Certificates, token_file: Path, tokens: dict[str, str]
) -> None:
    """
    Given TLS and tokens, which metrics have not
    I expect an address of the network to be refused, unless it is said to be private.
    """
    tls = ServerTls(certificates.server_cert, certificates.server_key)
    access = Access(tokens=Tokens(token_file), tls=tls)
    with pytest.raises(StartError, match=r"--metrics 0.0.0.0:9464: .* or say --insecure-metrics"):
        access.check_metrics("0.0.0.0:9464")
    access.check_metrics("127.0.0.1:9464")
    replace(access, insecure_metrics=True).check_metrics("0.0.0.0:9464")
    replace(access, insecure=True).check_metrics("0.0.0.0:9464")
