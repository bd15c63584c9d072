"""Certificates at every port: inside, where Python has mutual TLS and Envoy still reaches it; outside, by the settings."""

import asyncio
import contextlib
import socket
import ssl
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import grpc.aio
import models
import pytest
from gateway import MODEL, Features, Gateway, Rollout, arm, eventually, gateway, peers, route
from load import infer
from millrace_api.prediction.v1 import prediction_pb2, prediction_pb2_grpc
from millrace_kit.settings import TlsSettings
from parts import certificates


def secure(address: str, tls: TlsSettings, *, own: bool = True) -> grpc.aio.Channel:
    key, chain = (Path(tls.key_file).read_bytes(), Path(tls.cert_file).read_bytes()) if own else (None, None)
    credentials = grpc.ssl_channel_credentials(Path(tls.ca_file).read_bytes(), key, chain)
    options = [("grpc.ssl_target_name_override", "localhost"), ("grpc.use_local_subchannel_pool", 1)]
    return grpc.aio.secure_channel(address, credentials, options=options)


@contextlib.asynccontextmanager
async def with_tls_inside(tls: TlsSettings) -> AsyncIterator[tuple[Gateway, Rollout]]:
    with tempfile.TemporaryDirectory(prefix="gw-") as folder:
        g, rollout = Gateway(Path(folder), tls=tls.model_dump(), allowed_clients=["controller"]), Rollout()
        # The certificate names localhost, as a pod's names its Service.
        fields = g.config.read_text()
        for port in g.peer_ports:
            fields = fields.replace(f"127.0.0.1:{port}", f"localhost:{port}")
        g.config.write_text(fields)
        try:
            async with peers(rollout, Features(), g.peer_ports, tls):
                g.start_envoy()
                g.start_python()
                yield g, rollout
        except BaseException:
            print(g.logs())
            raise
        finally:
            await g.close()


async def test_mutual_tls_inside(tmp_path: Path) -> None:
    authority = certificates.Authority.new()
    tls = certificates.write(tmp_path / "one", authority, "localhost", "controller")
    other = certificates.write(tmp_path / "other", authority, "localhost", "somebody")
    async with with_tls_inside(tls) as (g, rollout), models.serving(models.Model("1.0.0")) as address:
        await rollout.in_force(rollout.set(route(arm("1.0.0", address))))
        # Through Envoy, which has no certificate: by the socket of the pod.
        assert list((await g.predict("flight-1", a=1.0, b=2.0, c=3.0)).outputs) == [6.0]
        assert await infer(g.public_channel, x_millrace_model=MODEL) == "1.0.0"
        async with secure(g.python_address, tls) as channel:
            figures = prediction_pb2_grpc.GatewayServiceStub(channel)

            async def counted() -> bool:
                found = await figures.GetFigures(prediction_pb2.GetFiguresRequest(), timeout=5)
                return [v.requests for v in found.versions] == [2] and found.logged == 2

            await eventually(counted, "both calls in figures and log")
        refused = grpc.StatusCode.UNAVAILABLE
        for channel, code in (
            (g.channel, refused),
            (secure(g.python_address, tls, own=False), refused),
            (secure(g.python_address, other), grpc.StatusCode.PERMISSION_DENIED),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await prediction_pb2_grpc.GatewayServiceStub(channel).GetFigures(
                    prediction_pb2.GetFiguresRequest(), timeout=5
                )
            assert caught.value.code() is code
            await channel.close()


def serial(address: str, tls: TlsSettings) -> int:
    """Serial number of the certificate that the port shows."""
    context = ssl.create_default_context(cafile=tls.ca_file)
    context.load_cert_chain(tls.cert_file, tls.key_file)
    context.set_alpn_protocols(["h2"])
    host, _, port = address.partition(":")
    with (
        socket.create_connection((host, int(port)), timeout=5) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as found,
    ):
        assert found.selected_alpn_protocol() == "h2"
        return int(str(found.getpeercert()["serialNumber"]), 16)


@pytest.mark.parametrize("mode", ["server", "mutual"])
async def test_tls_outside_and_an_exchanged_certificate(tmp_path: Path, mode: str) -> None:
    authority = certificates.Authority.new()
    tls = certificates.write(tmp_path / "server", authority, "localhost")
    client = certificates.write(tmp_path / "client", authority, "a-client")
    stranger = certificates.write(
        tmp_path / "stranger", certificates.Authority.new(), "a-client", trusted=authority.pem
    )
    public = tls.model_dump() | {"mode": mode}
    async with gateway(public_tls=public) as (g, rollout), models.serving(model := models.Model("1.0.0")) as address:
        await rollout.in_force(rollout.set(route(arm("1.0.0", address))))
        async with secure(g.public, client) as channel:
            assert await infer(channel, x_millrace_model=MODEL, x_millrace_client="somebody-else") == "1.0.0"
            assert model.metadata.get("x-millrace-client") == ("a-client" if mode == "mutual" else None)

            async def refused(other: grpc.aio.Channel) -> None:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await infer(other, x_millrace_model=MODEL)
                assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
                await other.close()

            await refused(g.public_channel)
            if mode == "mutual":
                await refused(secure(g.public, client, own=False))
                await refused(secure(g.public, stranger))
            else:
                async with secure(g.public, client, own=False) as anybody:
                    assert await infer(anybody, x_millrace_model=MODEL) == "1.0.0"
            before = await asyncio.to_thread(serial, g.public, client)
            certificates.write(tmp_path / "server", authority, "localhost")

            async def exchanged() -> bool:
                # The connection that stands goes on.
                assert await infer(channel, x_millrace_model=MODEL) == "1.0.0"
                return await asyncio.to_thread(serial, g.public, client) != before

            await eventually(exchanged, "the new certificate")
